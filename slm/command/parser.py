"""The parser of `train.py`."""

import inspect
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentError, Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from slm.command.flags import LINKED, explain_parser_error, read_settings
from slm.data import DummyData, TextData, TokenData
from slm.errors import InputError, check
from slm.run.loading import import_class
from slm.training.language_model import LanguageModel
from slm.watch.tensorboard import Watch


class CommandLineTrainer(Trainer):
    """Lightning's Trainer, of which a parser reads a whole number of batches as that many.

    Lightning declares these arguments as `Optional[Union[int, float]]`, which Python's cache of types turns into float
    before int where another package was first: `--trainer.limit_val_batches 1` then quietly means 1.0, all of them.
    """

    def __init__(
        self,
        *args: Any,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: int | float | str | timedelta | dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args,
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            overfit_batches=overfit_batches,
            val_check_interval=val_check_interval,
            **kwargs,
        )


class TrainingParser:
    """The parser of `train.py`: that of LightningCLI, with the options of one class of model.

    Args:
        model_class: whose options `--model.NAME` sets.
        subcommand: for the help.

    Raises:
        InputError: `configs/default.yaml` is missing or cannot be read.
    """

    def __init__(self, model_class: type[LanguageModel], subcommand: str) -> None:
        default = str(find_default_config())
        read_settings(default)  # which says better than the parser what is wrong with it
        self.parser = parser = LightningArgumentParser(
            prog=f"train.py {subcommand}",
            description=f"{subcommand}: train.py takes fit (the default), validate, test or predict before its flags",
            exit_on_error=False,
            allow_abbrev=False,
            default_config_files=[default],
        )
        parser.add_argument(
            "-c", "--config", action=ActionConfigFile, help="a YAML file of settings, or the text of one"
        )
        parser.add_argument("--ckpt_path", type=str | None, help="last, best, a run folder, or a .ckpt or .pt file")
        parser.add_argument("--init_from", type=str | None, help="a run, .ckpt or .pt: a new run begins as it ended")
        about = "let a run go on with other data than it was trained on; its best loss is then forgotten"
        parser.add_argument("--allow_changed_data", type=bool, default=False, help=about)
        parser.add_argument("--seed_everything", type=int, default=0, help="seed of all random numbers but the data's")
        parser.add_lightning_class_args(CommandLineTrainer, "trainer")
        parser.add_function_arguments(_maker(model_class), "model")
        parser.add_argument("--model.class_path", type=str | None, help="another class of model, also as --model CLASS")
        parser.add_subclass_arguments(TokenData, "data", skip={*LINKED}, required=True, instantiate=False)
        parser.add_class_arguments(Watch, "watch")

    def parse(self, flags: Sequence[str], argv: Sequence[str]) -> Namespace:
        """The settings in force under these flags; raises InputError for what is wrong in them.

        Args:
            flags: the command line and what comes before it.
            argv: the command line, for messages.
        """
        try:
            return self.parser.parse_args(list(flags))
        except ArgumentError as error:
            files, self.parser.default_config_files = self.parser.default_config_files, []  # they may be what is wrong
            known = dict.fromkeys(self.parser.get_defaults().keys(), "")
            self.parser.default_config_files = files
            for data in (DummyData, TextData, TokenData):
                known |= {f"data.{name}": data.__name__ for name in inspect.signature(data).parameters}
            raise InputError(explain_parser_error(str(error), known, argv)) from error

    def data_class(self, settings: Namespace) -> type[TokenData]:
        """The class of the data that settings name."""
        kind: type[TokenData] = import_class(settings.data.class_path, "data")
        return kind

    def instantiate(self, settings: Namespace) -> Namespace:
        """The settings with the Trainer's callbacks, loggers and plugins made."""
        return self.parser.instantiate(settings)

    def dump(self, settings: Namespace) -> str:
        """Settings in YAML, as `--config` takes them."""
        return str(self.parser.dump(settings, skip_unset=False))


def _maker(model_class: type[LanguageModel]) -> Callable[..., LanguageModel]:
    """A function with the whole signature of a class of models, those of its network's options included."""

    def make(**options: Any) -> LanguageModel:
        return model_class(**options)

    make.__signature__ = model_class.signature()  # type: ignore[attr-defined]
    documented = [*reversed(model_class.network.__mro__), *reversed(model_class.__mro__)]
    arguments = [re.search(r"\n *Args:\n((?: {8}.*\n|\n)+)", (kind.__doc__ or "") + "\n") for kind in documented]
    make.__doc__ = f"{model_class.__name__}.\n\n    Args:\n" + "".join(found[1] for found in arguments if found)
    return make


def find_default_config() -> Path:
    """`configs/default.yaml`: beside the package in a clone, inside it when installed from a wheel."""
    package = Path(__file__).resolve().parent.parent
    beside, inside = (folder / "configs" / "default.yaml" for folder in (package.parent, package))
    config = inside if inside.is_file() else beside
    check(config.is_file(), f"{beside} is missing: restore it, the Trainer's policy stands there")
    return config

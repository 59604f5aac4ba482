"""The parsers of the commands, and their errors in one line."""

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace, get_loader
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from slm.data import DummyData, TextData, TokenData
from slm.errors import InputError, check
from slm.paths import expand_paths
from slm.run.loading import import_class
from slm.training.language_model import LanguageModel
from slm.watch.tensorboard import Watch

LINKED = ("vocab_size", "max_seq_len")
"""What the data takes from the model."""


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


def read_settings(config: str) -> dict[str, Any]:
    """The content of a YAML file of settings, or of YAML text given in its place.

    Raises:
        InputError: the file is missing or unreadable, or it is not YAML, or not a mapping.
    """
    is_text = "{" in config or "\n" in config
    try:
        settings = get_loader("yaml")(config if is_text else Path(config).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{config} cannot be read: {error.strerror}") from error
    except Exception as error:  # the YAML library's own, which are not ours to name
        raise InputError(f"{config} is not valid YAML: {error}") from error
    check(isinstance(settings, dict), f"{config} holds no settings: it must be YAML like `trainer: {{max_epochs: 5}}`")
    return settings


def find_default_config() -> Path:
    """`configs/default.yaml`: beside the package in a clone, inside it when installed from a wheel."""
    package = Path(__file__).resolve().parent.parent
    beside, inside = (folder / "configs" / "default.yaml" for folder in (package.parent, package))
    config = inside if inside.is_file() else beside
    check(config.is_file(), f"{beside} is missing: restore it, the Trainer's policy stands there")
    return config


def new_parser(module: str) -> ArgumentParser:
    """The parser of the command `python -m slm.MODULE`."""
    return ArgumentParser(prog=f"python -m slm.{module}", exit_on_error=False, allow_abbrev=False)


def parse_flags(parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
    """The settings that a command line gives, by default this process's; raises InputError for what is wrong in it."""
    flags = list(sys.argv[1:] if argv is None else argv)
    try:
        settings: Namespace = expand_paths(parser.parse_args(flags))
    except ArgumentError as error:
        known = dict.fromkeys(parser.get_defaults().keys(), "")
        raise InputError(explain_parser_error(str(error), known, flags)) from error
    return settings


def explain_parser_error(message: str, known: Mapping[str, str], argv: Sequence[str]) -> str:
    """A parser's message of many lines as one line: the setting, its value and what was expected.

    Args:
        message: what jsonargparse says.
        known: names of all settings, to find the nearest to an unknown one, each with the class that alone has it.
        argv: the command line.
    """
    if without_value := re.search(r"argument (?:-\w/)?--([\w.]+)(?:/--\S+)*: expected one argument", message):
        return _explain_missing_value(without_value[1], argv)
    keys = re.findall(r'Parser key "([^"]+)"', message)
    unknown = re.search(r"[Oo]ption '([^']+)'|[Uu]nrecognized arguments: (?:--)?([^\s=]+)", message)
    if unknown:
        name = ".".join([*keys, *re.findall(r"Group '([^']+)'", message), unknown[1] or unknown[2]])
        if name.removeprefix("data.").removeprefix("init_args.") in LINKED:
            return f"{name} is taken from the model: set model.{name.rpartition('.')[2]} instead"
        if known.get(name):
            remedy = f"choose it with --data {known[name]} or --config"
            return f"{name} is a setting of {known[name]}, which is not the data chosen: {remedy}"
        near = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(name, known, n=1, cutoff=0)
        return f"unknown setting {name}; the nearest known one is {near[0]}"
    detail = message[message.rindex("Parser key") :] if keys else message
    value = re.search(r"(?:Got|Given) value: (.+)", detail)
    if not (keys and value):
        return " ".join(re.sub('Parser key "(.+?)"', r"\1", message).split())
    if "dot import path" in detail:
        classes = "DummyData or TextData" if keys == ["data"] else "a name like package.module.Class"
        return f"{'.'.join(keys)}={value[1]}: there is no such class; give {classes}"
    kinds = re.findall(r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.+?)\])", detail[: value.start()])
    expected = " or ".join("null" if kind == "NoneType" else kind or f"one of {choices}" for kind, choices in kinds)
    return f"{'.'.join(keys)}={value[1]}: expected {expected}"


def _explain_missing_value(name: str, argv: Sequence[str]) -> str:
    """For a flag whose value is missing, or looks like a flag; `name` is the flag or the group that it belongs to."""
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        if (flag == f"--{name}" or flag.startswith(f"--{name}.")) and (value.startswith("-") or not value):
            hint = f": one that begins with a dash is given as {flag}={value}" if value else ""
            return f"{flag.removeprefix('--')} needs a value{hint}"
    return f"{name} needs a value"

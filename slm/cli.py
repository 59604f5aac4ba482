"""Command line -> data, module, trainer: one run of `fit`, `validate`, `test` or `predict`."""

import inspect
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from slm.command.arguments import LINKED, CommandLineTrainer, read_request, read_settings
from slm.command.changes import check_same_data, say_what_changed
from slm.command.exit_codes import command, ends_in_one_line
from slm.command.parser import explain_parser_error
from slm.command.policy import check_trainer, find_default_config, trainer_arguments
from slm.command.streams import print_only_messages
from slm.data import DummyData, TextData
from slm.data.text_data import NAMED_TOKENIZERS
from slm.data.token_data import TokenData
from slm.errors import InputError, check
from slm.hardware import accelerator_kind, keep_freed_memory, resolve_precision
from slm.messages import say, silence_notices
from slm.paths import expand_paths
from slm.run.checkpoint import RUNS, claim_run, load_weights, open_checkpoint
from slm.run.keeper import begin, hold, stopped_by_signals, take_over
from slm.run.slurm import note_job
from slm.training.hyperparameters import check_applicable
from slm.training.language_model import LanguageModel
from slm.watch.report import closing_report, evaluated, show_in_tensorboard
from slm.watch.tensorboard import Watch


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    silence_notices()
    keep_freed_memory()
    with ends_in_one_line():
        CommandLine(list(sys.argv[1:] if argv is None else argv))


class CommandLine(LightningCLI):
    """LightningCLI with `fit` as the default subcommand, one folder a run, and a `--ckpt_path` that knows its run."""

    model: LanguageModel
    datamodule: TokenData
    run: Path | None = None
    is_new_run = False
    is_other_data_meant = False

    def __init__(self, argv: list[str]) -> None:
        """Run a command line; one that fails before its first step leaves no run behind."""
        self.argv, self.lock = argv, ExitStack()
        try:
            with stopped_by_signals(self._progress):
                self._run_command_line()
        except BaseException:
            self._drop_unused_run()
            raise

    def _run_command_line(self) -> None:
        shared = {"exit_on_error": False, "allow_abbrev": False}
        default = str(find_default_config())
        read_settings(default)
        super().__init__(
            LanguageModel,
            TokenData,
            subclass_mode_data=True,
            trainer_class=CommandLineTrainer,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs=shared | dict.fromkeys(self.subcommands(), shared | {"default_config_files": [default]}),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in LINKED:
            parser.link_arguments(f"model.{name}", f"data.init_args.{name}")
        parser.add_class_arguments(Watch, "watch")
        about = "let a run go on with other data than it was trained on; its best loss is then forgotten"
        parser.add_argument("--allow_changed_data", type=bool, default=False, help=about)
        parser.add_argument("--init_from", type=str | None, help="a run, .ckpt or .pt: a new run begins as it ended")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse `argv`; with `--ckpt_path`, on top of the settings that belong to the checkpoint."""
        self.request = request = read_request(self.argv)
        if request.run is not None and request.checkpoint is None:
            say(f"{request.run} has no checkpoint yet: it starts from step 0")
        elif request.run is not None and request.checkpoint is not None and request.checkpoint.stem != "last":
            say(f"{request.run} goes on from {request.checkpoint}")
        self.config = self._parse([request.subcommand, *request.stored, *request.flags])
        settings = self.config[request.subcommand]
        seed = settings.seed_everything
        check(0 <= seed < 2**32, f"seed_everything={seed} must be at least 0 and below 2**32")
        if request.content is not None:
            check_applicable(request.content["hyper_parameters"], dict(settings.model))
        if settings.init_from is not None and request.content is None:
            request.initial = request.initial or open_checkpoint(settings.init_from, prefer="best")
            settings.init_from = str(request.initial[0].absolute())
        elif request.stored:
            before = vars(self._parse([request.subcommand, *request.stored])[request.subcommand].as_flat())
            self.is_other_data_meant = say_what_changed(before, vars(settings.as_flat()), request)

    def _parse(self, argv: list[str]) -> jsonargparse.Namespace:
        try:
            config = self.parser.parse_args(argv)
        except jsonargparse.ArgumentError as error:
            reference = self._parser("fit")
            reference.default_config_files = []  # it may be what is wrong
            known = dict.fromkeys([*reference.get_defaults().keys(), *self.subcommands()], "")
            for data in (DummyData, TextData, TokenData):
                known |= {f"data.{name}": data.__name__ for name in inspect.signature(data).parameters}
            raise InputError(explain_parser_error(str(error), known, argv)) from error
        init_args = expand_paths(config)[config.subcommand].data.init_args
        for name in ("path", "val_path", "tokenizer"):  # absolute, since the run may go on from another folder
            if init_args.get(name) and (name != "tokenizer" or init_args[name] not in NAMED_TOKENIZERS):
                init_args[name] = str(Path(init_args[name]).absolute())
        return config

    def before_instantiate_classes(self) -> None:
        """Put the checkpoint back in its place, now that Lightning's CLI can no longer let it override flags."""
        config = self.config[self.subcommand]
        if self.request.content is not None and "optimizer_states" in self.request.content:
            config.ckpt_path = str(self.request.checkpoint)
        config.weights_only = True

    def instantiate_classes(self) -> None:
        """Instantiate as the config says; a class's own InputError comes out as it is, not wrapped by the parser."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError) as error:
            cause: BaseException = error
            while not isinstance(cause, InputError) and cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, InputError):
                raise cause from None
            raise InputError(f"a class cannot be made with these settings: {error}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with the project's precision, callbacks and run folder, which is made once all else is sound."""
        asked = self._get(self.config_init, "trainer")
        check_trainer(asked)
        accelerator = accelerator_kind(str(asked.accelerator))
        if accelerator == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 where a product is left in 32 bits
        precision, reason = resolve_precision(str(asked.precision or "32-true"), accelerator)
        if reason:
            say(reason)
        if (before := self.request.content) is None and self.request.initial is not None:
            path, before = self.request.initial
            load_weights(self.model.transformer, before, path)
        if before is not None:
            self.datamodule.continue_with(before.get("tokenizer"))
        if self.request.initial is not None:
            say(f"begins with the weights of {self.request.initial[0]}")
        self.datamodule.setup()
        if self.subcommand == "fit" and not self.is_other_data_meant:
            check_same_data(self.request, self.datamodule.fingerprint)
        keeps = self.subcommand == "fit" and not asked.fast_dev_run
        self.run = self.request.run if keeps else None
        self.is_new_run = keeps and self.run is None
        if self.subcommand == "fit":
            for line in self.datamodule.at_a_glance(sum(p.numel() for p in self.model.parameters())):
                say(line)
        if self.is_new_run:
            runs = Path(asked.default_root_dir or "") / RUNS
            self.run = claim_run(runs) if _is_rank_zero() else runs / "of_rank_zero"
        config, content = self._config_text(), self.request.content or {}
        if self.run is not None and _is_rank_zero():
            self.lock.enter_context(hold(self.run))
            if not self.is_new_run:
                take_over(self.run, content)
            if not content:
                begin(self.run, config, self.datamodule.tokenizer)
            note_job(self.run, self.argv)
        first_step = None if self.is_new_run else content.get("global_step", 0)
        watch = self._get(self.config_init, "watch")
        arguments = trainer_arguments(asked, str(self.subcommand), precision, self.run, config, first_step, watch)
        try:
            return super().instantiate_trainer(**arguments)
        except (ValueError, TypeError, RuntimeError, ModuleNotFoundError, MisconfigurationException) as error:
            raise InputError(f"the Trainer refuses its settings: {error}") from error

    def _config_text(self) -> str:
        """The settings in force, as they were asked for."""
        config = self.config[self.subcommand].clone()
        for name in ("config", "ckpt_path", "weights_only", "allow_changed_data"):
            config.pop(name, None)
        return str(self._parser(self.subcommand).dump(config, skip_none=False))

    def _progress(self) -> tuple[int, Path | None]:
        """How many steps are done, and the newest checkpoint of the run."""
        trainer = getattr(self, "trainer", None)
        last = None if self.run is None else self.run / "checkpoints" / "last.ckpt"
        return trainer.global_step if trainer else 0, last if last and last.is_file() else None

    def _drop_unused_run(self) -> None:
        """Remove the folder of a new run in which no step is done, unless it holds a checkpoint all the same."""
        if self.run is not None and self._progress()[0] <= (self.request.content or {}).get("global_step", 0):
            kept = self.run / "checkpoints"
            if not (kept.is_dir() and any(kept.iterdir())):
                self._drop_new_run()

    def _drop_new_run(self) -> None:
        if self.is_new_run and self.run is not None and _is_rank_zero():
            self.lock.close()  # some file systems keep what is open
            shutil.rmtree(self.run, ignore_errors=True)
            self.is_new_run = False

    def fit(self, **kwargs: Any) -> None:
        """Train; what is printed from here on is no result."""
        print_only_messages()
        with self.lock:
            self.trainer.fit(**kwargs)

    def before_validate(self) -> None:
        """Load bare weights, which the Trainer cannot."""
        if self.request.content is not None and self.config[self.subcommand].ckpt_path is None:
            assert self.request.checkpoint is not None
            load_weights(self.model.transformer, self.request.content, self.request.checkpoint)

    before_test = before_predict = before_validate

    def after_fit(self) -> None:
        """Validate the best checkpoint, which adds no point to the curves, and print the report."""
        trainer, loggers = self.trainer, self.trainer.loggers
        self.run = trainer.strategy.broadcast(self.run)
        done_before = (self.request.content or {}).get("global_step")
        if self.is_new_run and trainer.global_step == 0:
            raise InputError("no step was trained: ask for one with --trainer.max_epochs, max_steps or max_time")
        if trainer.global_step == done_before:
            if self.is_new_run:
                self._drop_new_run()
                raise InputError(f"{self.request.checkpoint} has done its {done_before} steps: ask for more of them")
            say(f"nothing was left to do: the run had already done its {done_before} steps; ask for more as below")
        metrics: Mapping[str, Any] = trainer.callback_metrics
        best = self.run / "checkpoints" / "best.ckpt" if self.run is not None else None
        has_best = best is not None and best.is_file()
        if has_best:
            trainer.logger = None
            if trainer.progress_bar_callback is not None:
                trainer.progress_bar_callback.disable()
            [metrics] = trainer.validate(
                self.model, datamodule=self.datamodule, ckpt_path=str(best), verbose=False, weights_only=True
            )
        if self.run is not None:
            hparams = {**self.datamodule.hparams, **self.model.hparams}
            reached = metrics["val/loss"] if has_best else None
            figure, step = self._get(self.config_init, "watch").loss_figure, trainer.global_step
            show_in_tensorboard(loggers, self.run, hparams, reached, self.datamodule.optimum, step, figure)
        if trainer.is_global_zero:
            print(closing_report(trainer, self.datamodule, metrics, self.run, command()))

    def after_validate(self) -> None:
        say(evaluated(self.trainer, self.datamodule, str(self.subcommand)))

    after_test = after_validate

    def predict(self, **kwargs: Any) -> None:
        """Print the greedy next token of each held-out window, one a line."""
        check(self.trainer.world_size == 1, "predict prints the windows in their order: use --trainer.devices 1")
        predictions: Any = self.trainer.predict(**kwargs)
        print(*torch.cat(predictions).tolist(), sep="\n")


def _is_rank_zero() -> bool:
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()

"""Command line -> data, module, trainer: one run of `fit`, `validate`, `test` or `predict`."""

import inspect
import os
import re
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from slm.checkpoint import (
    RUNS,
    BestCheckpoint,
    LastCheckpoint,
    SelfContained,
    claim_run,
    replace_file,
    transformer_state,
)
from slm.data import DummyData, TextData, TokenData
from slm.errors import InputError, check
from slm.hardware import accelerator_kind, resolve_precision
from slm.module import LanguageModel, check_applicable
from slm.monitor import HPARAMS_LOSS, KnownLimits, ProgressBar, Throughput, closing_report
from slm.notices import explain_parser_error, silence_notices
from slm.resume import find_start

LINKED = ("vocab_size", "max_seq_len")
"""What the data takes from the model."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is one line on stderr and exit status 2 (SLM_TRACEBACK=1 for more)."""
    silence_notices()
    try:
        CommandLine(list(sys.argv[1:] if argv is None else argv))
    except (InputError, MisconfigurationException) as error:
        if os.environ.get("SLM_TRACEBACK"):
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


@rank_zero_only
def say(message: str) -> None:
    """Print a line on stderr, once, however many processes there are."""
    print(message, file=sys.stderr, flush=True)


class CommandLine(LightningCLI):
    """LightningCLI with `fit` as the default subcommand, one folder a run, and a `--ckpt_path` that knows its run."""

    model: LanguageModel
    datamodule: TokenData

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv
        shared = {"exit_on_error": False, "allow_abbrev": False}
        default = {"default_config_files": [str(_default_config())]}
        super().__init__(
            LanguageModel,
            TokenData,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs=shared | dict.fromkeys(self.subcommands(), shared | default),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in LINKED:
            parser.link_arguments(f"model.{name}", f"data.init_args.{name}")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse `argv`; with `--ckpt_path`, on top of the settings that belong to the checkpoint."""
        subcommand, flags = _split_subcommand(self.argv, self.subcommands())
        _refuse_linked(flags)
        flags, ckpt_path = _take_option(flags, "ckpt_path")
        self.start = find_start(subcommand, ckpt_path)
        if self.start.run is not None and self.start.checkpoint is None:
            say(f"{self.start.run} has no checkpoint yet: it starts from step 0")
        stored = [] if self.start.config is None else [f"--config={self.start.config}"]
        self.config = self._parse([subcommand, *stored, *flags])
        if self.start.content is not None:
            check_applicable(self.start.content["hyper_parameters"], dict(self.config[subcommand].model))
        if stored:
            before = vars(self._parse([subcommand, *stored])[subcommand].as_flat())
            for name, value in sorted(vars(self.config[subcommand].as_flat()).items()):
                if name != "config" and before.get(name) != value:
                    say(f"{name} is now {value} (the run had {before.get(name)})")

    def _parse(self, argv: list[str]) -> jsonargparse.Namespace:
        try:
            return self.parser.parse_args(argv)
        except jsonargparse.ArgumentError as error:
            known = set(self._parser("fit").get_defaults().keys())
            for data in (DummyData, TextData, TokenData):
                known |= {f"data.{name}" for name in inspect.signature(data).parameters}
            raise InputError(explain_parser_error(str(error), known)) from error

    def before_instantiate_classes(self) -> None:
        """Put the checkpoint back in its place, now that Lightning's CLI can no longer let it override flags."""
        config = self.config[self.subcommand]
        if self.start.checkpoint is not None and self.start.checkpoint.suffix != ".pt":
            config.ckpt_path = str(self.start.checkpoint)
        config.weights_only = True

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with the project's precision, callbacks and run folder, which is made once all else is sound."""
        asked = self._get(self.config_init, "trainer")
        precision, reason = resolve_precision(str(asked.precision), accelerator_kind(str(asked.accelerator)))
        if reason:
            say(reason)
        self.datamodule.setup()
        self.run = self.start.run
        claims = self.subcommand == "fit" and not asked.fast_dev_run and self.run is None
        if claims:
            self.run = claim_run(Path(asked.default_root_dir or "") / RUNS)
        try:
            trainer = super().instantiate_trainer(
                precision=precision,
                default_root_dir=self.run or asked.default_root_dir,
                logger=self._logger(asked.logger),
                callbacks=[*(asked.callbacks or []), *self._callbacks(asked)],
                enable_progress_bar=asked.enable_progress_bar is not False and self.subcommand != "predict",
            )
            if claims:
                self.save_config()
            return trainer
        except (ValueError, TypeError, MisconfigurationException) as error:
            if claims and self.run is not None:
                self.run.rmdir()
            raise InputError(str(error)) from error

    def _logger(self, asked: Any) -> Any:
        if asked not in (None, True):
            return asked
        if self.run is None:
            return False
        return TensorBoardLogger(self.run.parent, name="", version=self.run.name, default_hp_metric=False)

    def _callbacks(self, asked: jsonargparse.Namespace) -> list[Callback]:
        callbacks: list[Callback] = [KnownLimits()]
        if asked.enable_progress_bar is not False and self.subcommand != "predict":
            callbacks.append(ProgressBar())
        if self.subcommand == "fit":
            callbacks += [Throughput(), SelfContained()]
            if asked.logger is not False and not asked.fast_dev_run:
                callbacks.append(LearningRateMonitor("step"))
        if self.run is not None:
            callbacks.append(ConfigKeeper(self))
            if asked.enable_checkpointing is not False:
                callbacks += [BestCheckpoint(self.run), LastCheckpoint(self.run)]
        return callbacks

    @rank_zero_only
    def save_config(self) -> None:
        """Write the settings in force, as they were asked for, to the run's `config.yaml`."""
        assert self.run is not None
        config = self.config[self.subcommand].clone()
        for name in ("config", "ckpt_path", "weights_only"):
            config.pop(name, None)
        text = self._parser(self.subcommand).dump(config, skip_none=False)
        replace_file(self.run / "config.yaml", text.encode())

    def before_validate(self) -> None:
        self._load_weights()

    before_test = before_predict = before_validate

    def _load_weights(self) -> None:
        if self.start.checkpoint is not None and self.start.checkpoint.suffix == ".pt":
            assert self.start.content is not None
            self.model.transformer.load_state_dict(transformer_state(self.start.content))

    def after_fit(self) -> None:
        """Validate the best checkpoint, which adds no point to the curves, and print the report."""
        trainer, loggers = self.trainer, self.trainer.loggers
        resumed_at = self.start.content["global_step"] if self.start.content is not None else None
        if resumed_at == trainer.global_step:
            say(f"nothing was left to do: the run had already done its {resumed_at} steps; ask for more as below")
        metrics: Mapping[str, Any] = trainer.callback_metrics
        best = self.run / "checkpoints" / "best.ckpt" if self.run is not None else None
        if best is not None and best.is_file():
            trainer.logger = None
            if trainer.progress_bar_callback is not None:
                trainer.progress_bar_callback.disable()
            [metrics] = trainer.validate(
                self.model, datamodule=self.datamodule, ckpt_path=str(best), verbose=False, weights_only=True
            )
            for logger in loggers:
                if isinstance(logger, TensorBoardLogger):
                    hparams = {**self.datamodule.hparams, **self.model.hparams}
                    logger.log_hyperparams(hparams, {HPARAMS_LOSS: metrics["val/loss"]})
                    logger.save()
        if trainer.is_global_zero:
            print(closing_report(trainer, self.datamodule, metrics, self.run, _command()))

    def after_validate(self) -> None:
        windows = self.datamodule.val_windows
        assert windows is not None
        say(f"{self.subcommand}: the held-out split, {len(windows)} windows of {windows.seq_len} tokens")

    after_test = after_validate

    def predict(self, **kwargs: Any) -> None:
        """Print the greedy next token of each held-out window, one a line."""
        predictions: Any = self.trainer.predict(**kwargs)
        print(*torch.cat(predictions).tolist(), sep="\n")


class ConfigKeeper(Callback):
    """Writes `config.yaml` again when a resumed run starts to train, so that it holds the settings now in force."""

    def __init__(self, command_line: CommandLine) -> None:
        self.command_line = command_line

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.command_line.save_config()


def _default_config() -> Path:
    """`configs/default.yaml`: beside the package in a clone, inside it when installed from a wheel."""
    package = Path(__file__).resolve().parent
    beside, inside = (folder / "configs" / "default.yaml" for folder in (package.parent, package))
    config = inside if inside.is_file() else beside
    check(config.is_file(), f"{beside} is missing: restore it, the Trainer's policy stands there")
    return config


def _split_subcommand(argv: list[str], subcommands: Collection[str]) -> tuple[str, list[str]]:
    return (argv[0], argv[1:]) if argv and argv[0] in subcommands else ("fit", argv)


def _take_option(flags: list[str], name: str) -> tuple[list[str], str | None]:
    """The flags without `--name`, and its last value."""
    left, value, rest = [], None, iter(flags)
    for flag in rest:
        if flag == f"--{name}":
            value = next(rest, None)
            check(value is not None, f"--{name} needs a value")
        elif flag.startswith(f"--{name}="):
            value = flag.partition("=")[2]
        else:
            left.append(flag)
    return left, value


def _refuse_linked(flags: list[str]) -> None:
    """Refuse what the parser would silently ignore: settings of the data that are taken from the model."""
    for flag in flags:
        match = re.match(rf"--data\.(?:init_args\.)?({'|'.join(LINKED)})(?:=|$)", flag)
        check(match is None, f"{flag.partition('=')[0]} is taken from the model: use --model.{match and match[1]}")


def _command() -> str:
    """How this process was started, without its arguments, as its user would type it again."""
    return shlex.join(sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1])

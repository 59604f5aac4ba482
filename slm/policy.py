"""The Trainer's settings as they are asked for -> the arguments that it is built with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from slm.checkpoint import BestCheckpoint, LastCheckpoint, SelfContained, replace_file
from slm.monitor import KnownLimits, ProgressBar, StepMonitor


def trainer_arguments(
    asked: Mapping[str, Any], subcommand: str, precision: str, run: Path | None, config: str
) -> dict[str, Any]:
    """What differs from the settings asked for: the project's own joins them, and its places are in the run's folder.

    Args:
        asked: the Trainer's settings.
        subcommand: what the Trainer is for.
        precision: as this machine does it.
        run: the run's folder; None where nothing is kept.
        config: the settings in force, for the run's `config.yaml`.
    """
    callbacks: list[Callback] = [*(asked["callbacks"] or []), KnownLimits()]
    shows_bar = asked["enable_progress_bar"] is not False and subcommand != "predict"
    if shows_bar and not any(isinstance(callback, LightningProgressBar) for callback in callbacks):
        callbacks.append(ProgressBar())
    if subcommand == "fit":
        callbacks += [StepMonitor(), SelfContained()]
    if run is not None:
        callbacks.append(ConfigKeeper(run / "config.yaml", config))
        if asked["enable_checkpointing"] is not False:
            callbacks += [BestCheckpoint(run), LastCheckpoint(run)]
    return {
        "precision": precision,
        "default_root_dir": run or asked["default_root_dir"],
        "logger": _loggers(asked["logger"], run),
        "callbacks": callbacks,
        "enable_progress_bar": shows_bar,
    }


def _loggers(asked: Any, run: Path | None) -> list[Logger]:
    """The user's loggers, and TensorBoard's in the run's folder unless that, or none at all, is asked for."""
    given = asked if isinstance(asked, list) else [asked]
    loggers = [logger for logger in given if isinstance(logger, Logger)]
    has_own = any(isinstance(logger, TensorBoardLogger) for logger in loggers)
    if run is None or asked is False or has_own:
        return loggers
    return [TensorBoardLogger(run.parent, name="", version=run.name, default_hp_metric=False), *loggers]


class ConfigKeeper(Callback):
    """Writes `config.yaml` when training starts, so that after a resume it holds the settings now in force."""

    def __init__(self, path: Path, config: str) -> None:
        self.path = path
        self.config = config

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        replace_file(self.path, self.config.encode())

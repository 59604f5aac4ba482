"""The Trainer's settings as they are asked for -> the arguments that it is built with."""

import math
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from slm.durable import replace_file
from slm.errors import InputError, check
from slm.run.checkpoint import DurableCheckpointIO
from slm.run.keeper import BestCheckpoint, LastCheckpoint, SelfContained
from slm.run.resume import ExactResume
from slm.watch.monitor import KnownLimits, ProgressBar, StepMonitor
from slm.watch.tensorboard import Watch, Watcher


def find_default_config() -> Path:
    """`configs/default.yaml`: beside the package in a clone, inside it when installed from a wheel."""
    package = Path(__file__).resolve().parent.parent
    beside, inside = (folder / "configs" / "default.yaml" for folder in (package.parent, package))
    config = inside if inside.is_file() else beside
    check(config.is_file(), f"{beside} is missing: restore it, the Trainer's policy stands there")
    return config


AT_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "limit_predict_batches": 0,
    "limit_test_batches": 0,
    "limit_train_batches": 0,
    "limit_val_batches": 0,
    "log_every_n_steps": 0,
    "max_epochs": -1,
    "max_steps": -1,
    "min_epochs": 0,
    "min_steps": 0,
    "num_nodes": 1,
    "num_sanity_val_steps": -1,
    "overfit_batches": 0,
    "reload_dataloaders_every_n_epochs": 0,
}
"""The least value of the Trainer's numbers; -1 stands for no limit, or for all."""


def check_trainer(asked: Mapping[str, Any]) -> None:
    """Raise InputError for what Lightning would not refuse, or only in the middle of a run."""
    is_apart = any(word in str(asked["strategy"]) for word in ("fork", "spawn", "notebook"))
    check(not is_apart, f"trainer.strategy={asked['strategy']} gives nothing back of what it trains: use ddp")
    for name, least in AT_LEAST.items():
        value = asked[name]
        is_fine = value is None or least <= value < math.inf  # NaN is not
        check(is_fine, f"trainer.{name}={value} must be at least {least}, and finite")
    interval = asked["val_check_interval"]
    is_fine = not isinstance(interval, int | float) or 0 < interval <= 1 or (isinstance(interval, int) and interval > 1)
    rule = "must be a whole number of batches, at least 1, or a share of an epoch above 0 and at most 1"
    check(is_fine, f"trainer.val_check_interval={interval} {rule}")
    for name in ("max_time", "val_check_interval"):
        try:
            length = timedelta(**asked[name]) if isinstance(asked[name], dict) else asked[name]
        except TypeError as error:
            raise InputError(f"trainer.{name}={asked[name]} is no length of time: {error}") from error
        is_fine = not isinstance(length, timedelta) or length > timedelta(0)
        check(is_fine, f"trainer.{name}={asked[name]} must be longer than no time")


def trainer_arguments(
    asked: Mapping[str, Any],
    subcommand: str,
    precision: str,
    run: Path | None,
    config: str,
    first_step: int | None,
    watch: Watch,
) -> dict[str, Any]:
    """What differs from the settings asked for: the project's own joins them, and its places are in the run's folder.

    Args:
        asked: the Trainer's settings.
        subcommand: what the Trainer is for.
        precision: as this machine does it.
        run: the run's folder; None where nothing is kept.
        config: the settings in force, for the run's `config.yaml`.
        first_step: where a resumed run goes on; None for a new one.
        watch: what is shown in TensorBoard beside the curves.
    """
    callbacks: list[Callback] = [*(asked["callbacks"] or []), KnownLimits()]
    shows_bar = asked["enable_progress_bar"] is not False and subcommand != "predict"
    first: list[Callback] = []
    if shows_bar and not any(isinstance(callback, LightningProgressBar) for callback in callbacks):
        first.append(ProgressBar())  # to end its line before anything is said
    if subcommand == "fit":
        resume = ExactResume()
        first.append(resume)
        callbacks += [StepMonitor(), SelfContained()]
        if run is not None:
            callbacks += [ConfigKeeper(run / "config.yaml", config), Watcher(watch)]
            if asked["enable_checkpointing"] is not False:
                first.append(LastCheckpoint(run, resume))
                callbacks.append(BestCheckpoint(run))
    return {
        "precision": precision,
        "default_root_dir": run or asked["default_root_dir"],
        "logger": _loggers(asked["logger"], run, first_step),
        "plugins": _plugins(asked["plugins"]),
        "callbacks": first + callbacks,
        "enable_progress_bar": shows_bar,
    }


def _plugins(asked: Any) -> list[Any]:
    """The user's plugins, and the durable writer of checkpoints and what tells of SLURM unless they have their own."""
    given = asked if isinstance(asked, list) else [asked] if asked is not None else []
    ours: list[Any] = []
    if not any(isinstance(plugin, CheckpointIO) for plugin in given):
        ours.append(DurableCheckpointIO())
    if SLURMEnvironment.detect() and not any(isinstance(plugin, ClusterEnvironment) for plugin in given):
        ours.append(SLURMEnvironment(auto_requeue=False))  # `slm.run.slurm` requeues; Lightning's checkpoint is another
    return [*given, *ours]


def _loggers(asked: Any, run: Path | None, first_step: int | None) -> list[Logger]:
    """The user's loggers, and TensorBoard's in the run's folder unless that, or none at all, is asked for.

    TensorBoard purges the points of a killed run from `first_step` on, which are drawn once more.
    """
    given = asked if isinstance(asked, list) else [asked]
    loggers = [logger for logger in given if isinstance(logger, Logger)]
    has_own = any(isinstance(logger, TensorBoardLogger) for logger in loggers)
    if run is None or asked is False or has_own:
        return loggers
    return [Curves(run.parent, name="", version=run.name, default_hp_metric=False, purge_step=first_step), *loggers]


class Curves(TensorBoardLogger):
    """TensorBoard's logger without the curve `epoch`, which Lightning draws twice at every validation."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


class ConfigKeeper(Callback):
    """Writes `config.yaml` when training starts, so that after a resume it holds the settings now in force."""

    def __init__(self, path: Path, config: str) -> None:
        self.path = path
        self.config = config

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        replace_file(self.path, self.config.encode())

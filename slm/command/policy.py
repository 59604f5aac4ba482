"""The Trainer's settings as they are asked for -> the arguments that it is built with."""

import math
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from slm.errors import InputError, check
from slm.hardware import accelerator_kind, resolve_precision
from slm.messages import say
from slm.run.callbacks import BestCheckpoint, ConfigKeeper, LastCheckpoint, SelfContained
from slm.run.checkpoint import DurableCheckpointIO
from slm.run.resume import ExactResume
from slm.watch.monitor import KnownLimits, ProgressBar, StepMonitor
from slm.watch.tensorboard import Watch, Watcher

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
    callbacks, num_batches = asked["callbacks"] or [], asked["accumulate_grad_batches"]
    is_steady = not any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks)
    check(is_steady, "GradientAccumulationScheduler changes how many batches make a step: use accumulate_grad_batches")
    for name, least in AT_LEAST.items():
        value = asked[name]
        is_fine = value is None or least <= value < math.inf  # NaN is not
        check(is_fine, f"trainer.{name}={value} must be at least {least}, and finite")
    interval = asked["val_check_interval"]
    is_fine = not isinstance(interval, int | float) or 0 < interval <= 1 or (isinstance(interval, int) and interval > 1)
    rule = "must be a whole number of batches, at least 1, or a share of an epoch above 0 and at most 1"
    check(is_fine, f"trainer.val_check_interval={interval} {rule}")
    is_fine = num_batches == 1 or interval is None or isinstance(interval, int | float)
    rule = f"may fall inside a step of accumulate_grad_batches={num_batches}: give a number of batches"
    check(is_fine, f"trainer.val_check_interval={interval} {rule}")
    for name in ("max_time", "val_check_interval"):
        try:
            length = timedelta(**asked[name]) if isinstance(asked[name], dict) else asked[name]
        except TypeError as error:
            raise InputError(f"trainer.{name}={asked[name]} is no length of time: {error}") from error
        is_fine = not isinstance(length, timedelta) or length > timedelta(0)
        check(is_fine, f"trainer.{name}={asked[name]} must be longer than no time")


def resolve_devices(asked: Mapping[str, Any]) -> str:
    """The precision on the accelerator that is asked for, as this machine does it, and its products of matrices.

    Raises:
        InputError: a GPU is asked for and there is none.
    """
    accelerator = accelerator_kind(str(asked["accelerator"]))
    if accelerator == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where a product is left in 32 bits
    precision, reason = resolve_precision(str(asked["precision"] or "32-true"), accelerator)
    if reason:
        say(reason)
    return precision


def trainer_arguments(
    asked: Mapping[str, Any],
    subcommand: str,
    precision: str,
    run: Path | None,
    config: str,
    first_step: int | None,
    watch: Watch,
    content: dict[str, Any] | None,
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
        content: of the checkpoint that is loaded, which is read already.
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
        "plugins": _plugins(asked["plugins"], content),
        "callbacks": first + callbacks,
        "enable_progress_bar": shows_bar,
    }


def _plugins(asked: Any, content: dict[str, Any] | None) -> list[Any]:
    """The user's plugins, and the durable writer of checkpoints and what tells of SLURM unless they have their own."""
    given = asked if isinstance(asked, list) else [asked] if asked is not None else []
    ours: list[Any] = []
    if not any(isinstance(plugin, CheckpointIO) for plugin in given):
        ours.append(DurableCheckpointIO(content))
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

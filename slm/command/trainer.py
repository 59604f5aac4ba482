"""The Trainer: its settings checked, the project's own callbacks, logger and plugins added."""

import math
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins.precision import DoublePrecision

from slm.command.settings import Command
from slm.errors import InputError, check
from slm.hardware import accelerator_kind, resolve_precision
from slm.messages import say
from slm.run.callbacks import BestCheckpoint, ConfigKeeper, LastCheckpoint, SelfContained
from slm.run.checkpoint_io import DurableCheckpointIO
from slm.run.control import Control
from slm.run.folder import RunFolder
from slm.run.lightning_internals import without_signals
from slm.run.processes import Processes
from slm.run.resume import ExactResume
from slm.run.sharding import FullySharded
from slm.watch.monitor import Forecast, KnownLimits, ProgressBar, StepMonitor
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
FSDP2 = "fsdp2"


def check_trainer(asked: Mapping[str, Any], num_processes: int = 1) -> None:
    """Raise InputError for what Lightning would not refuse, or only in the middle of a run."""
    accelerator_kind(str(asked["accelerator"]))
    _check_strategy(asked["strategy"])
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
    is_fine = num_processes == 1 or interval is None or isinstance(interval, int | float)
    rule = f"goes by the clocks of {num_processes} processes, which differ: give a number of batches"
    check(is_fine, f"trainer.val_check_interval={interval} {rule}")
    for name in ("max_time", "val_check_interval"):
        try:
            length = timedelta(**asked[name]) if isinstance(asked[name], dict) else asked[name]
        except TypeError as error:
            raise InputError(f"trainer.{name}={asked[name]} is no length of time: {error}") from error
        is_fine = not isinstance(length, timedelta) or length > timedelta(0)
        check(is_fine, f"trainer.{name}={asked[name]} must be longer than no time")


def _check_strategy(asked: Any) -> None:
    name = asked if isinstance(asked, str) else getattr(asked, "class_path", type(asked).__name__).rpartition(".")[2]
    method = getattr(getattr(asked, "init_args", None), "start_method", "popen")
    check(
        method == "popen", f"trainer.strategy.start_method={method} gives nothing back of what it trains: leave it out"
    )
    reasons = {
        ("fork", "spawn", "notebook"): "gives nothing back of what it trains: use ddp",
        ("fsdp", "FSDPStrategy"): "measures and clips the gradient of each shard alone: use fsdp2",
    }
    for words, reason in reasons.items():
        is_meant = name != FSDP2 and any(word in name for word in words)
        check(not is_meant, f"trainer.strategy={name} {reason}")
    is_known = name in ("auto", FSDP2, "DDPStrategy", "SingleDeviceStrategy") or name.startswith("ddp")
    check(is_known, f"trainer.strategy={name} is not one that this project is right under: use auto, ddp or fsdp2")


def resolve_precision_of(asked: Mapping[str, Any]) -> str:
    """The precision asked for, as this machine does it; where that is another one, it is said."""
    accelerator = accelerator_kind(str(asked["accelerator"]))
    if accelerator == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where a product is left in 32 bits
    precision, reason = resolve_precision(str(asked["precision"] or "32-true"), accelerator)
    if reason:
        say(reason)
    return precision


def new_trainer(
    command: Command, settings: Namespace, folder: RunFolder | None, control: Control | None = None
) -> Trainer:
    """The Trainer as asked for, with the project's callbacks, and its places in the run's folder.

    Args:
        command: what is to be done. The content of its checkpoint is released to the Trainer.
        settings: those of the command, with callbacks, loggers and plugins made.
        folder: of the run; None where nothing is kept.
        control: agrees with the other processes when to save and to stop; None for a process alone.

    Raises:
        InputError: the Trainer refuses its settings.
    """
    control = control or Control(Processes())
    asked = vars(settings.trainer)
    run = None if folder is None else folder.path
    content = command.start.release_content()
    shows_bar = asked["enable_progress_bar"] is not False and command.subcommand != "predict"
    is_resumed = folder is not None and not folder.is_new
    ours = {
        "precision": resolve_precision_of(asked),
        "default_root_dir": run or asked["default_root_dir"],
        "logger": _loggers(asked["logger"], run, command.start.steps or 0 if is_resumed else None),
        "plugins": _plugins(asked["plugins"], content if command.ckpt_path else None, control.processes),
        "callbacks": _callbacks(command, settings, run, shows_bar, control),
        "enable_progress_bar": shows_bar,
        "use_distributed_sampler": False,  # the data gives each process its own share
    }
    if asked["strategy"] == FSDP2:
        ours.update(_strategy(ours, control.processes.world_size))
    try:
        return without_signals(Trainer(**{**asked, **ours}))
    except (ValueError, TypeError, RuntimeError, ModuleNotFoundError, MisconfigurationException) as error:
        raise InputError(f"the Trainer refuses its settings: {error}") from error


def shards_model(asked: Mapping[str, Any], num_processes: int) -> bool:
    """Whether each process has a shard of the model alone; there is none to share it with on one device."""
    return bool(asked["strategy"] == FSDP2) and num_processes > 1


def _strategy(ours: Mapping[str, Any], num_processes: int) -> dict[str, Any]:
    """What fsdp2 changes in our arguments of the Trainer; raises InputError for a precision that scales gradients."""
    if num_processes == 1:
        say("fsdp2: on one device nothing is sharded")
        return {"strategy": "auto"}
    check(
        ours["precision"] not in ("16-mixed", "16"),
        "trainer.precision=16-mixed scales gradients, which is not done of shards: use bf16-mixed",
    )
    changes: dict[str, Any] = {"strategy": FullySharded(num_processes)}
    if ours["precision"] in ("64-true", "64"):  # Lightning refuses the word under such a strategy, and takes the plugin
        changes.update(precision=None, plugins=[*ours["plugins"], DoublePrecision()])
    return changes


def _without_weights(watch: Watch) -> Watch:
    """What can be shown of a sharded model: nothing for which rank 0 would need the other ranks' weights."""
    if watch.samples or watch.attention or watch.embedding:
        say("fsdp2: samples, attention and embedding are not shown of a sharded model")
    return replace(watch, samples=False, attention=False, embedding=False)


def _callbacks(
    command: Command, settings: Namespace, run: Path | None, shows_bar: bool, control: Control
) -> list[Callback]:
    """The user's callbacks and ours, in the order in which they must act."""
    first: list[Callback] = []
    others: list[Callback] = [*(settings.trainer.callbacks or []), KnownLimits()]
    if shows_bar and not any(isinstance(callback, LightningProgressBar) for callback in others):
        first.append(ProgressBar())  # to end its line before anything is said
    if command.subcommand == "fit":
        resume = ExactResume()
        first.append(resume)
        others += [StepMonitor(), Forecast(), SelfContained()]
        if run is not None:
            has_shards = shards_model(vars(settings.trainer), control.processes.world_size)
            watch = _without_weights(settings.watch) if has_shards else settings.watch
            others += [ConfigKeeper(run / "config.yaml", command.text()), Watcher(watch)]
            if settings.trainer.enable_checkpointing is not False:
                first.append(LastCheckpoint(run, resume, control))
                others.append(BestCheckpoint(run))
    return first + others


def _plugins(asked: Any, content: dict[str, Any] | None, processes: Processes) -> list[Any]:
    """The user's plugins, the durable writer of checkpoints and what tells which process this is, if they lack it."""
    given = asked if isinstance(asked, list) else [asked] if asked is not None else []
    ours: list[Any] = []
    if not any(isinstance(plugin, CheckpointIO) for plugin in given):
        ours.append(DurableCheckpointIO(content))
    if not any(isinstance(plugin, ClusterEnvironment) for plugin in given):
        # of a process alone too, which Lightning would else take for a part of its SLURM job
        ours.append(TorchElasticEnvironment() if processes.launcher else LightningEnvironment())
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

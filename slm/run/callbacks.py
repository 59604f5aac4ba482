"""What a run keeps of itself, and when: the best checkpoint, the last one, its settings."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from slm.durable import replace_file
from slm.errors import InputError, NotFiniteError, NotWrittenError, Stopped
from slm.messages import say
from slm.run.checkpoint import WEIGHTS_NAME, last_checkpoint
from slm.run.checkpoint_io import DurableCheckpointIO
from slm.run.control import SAVE, Control
from slm.run.loading import class_path_of
from slm.run.resume import ExactResume, is_fitting

CURVES = "events.out.tfevents.*"
SECONDS_BETWEEN_SAVES = 60.0
LARGEST_SHARE_OF_TIME = 0.01
"""What saving by the clock may cost: a save that takes long makes the next one wait."""


class SelfContained(Callback):
    """Adds to every checkpoint what a copy of it, alone, needs: the classes of its model and data, and its tokenizer.

    It refuses to replace a sound checkpoint by one that is not.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raises NotFiniteError, on all processes, where a weight is not finite. Under fsdp2 rank 0 alone has them."""
        names = (name for name, weights in checkpoint["state_dict"].items() if not torch.isfinite(weights).all())
        if (name := trainer.strategy.broadcast(next(names, None))) is not None:
            raise NotFiniteError(f"step {trainer.global_step}: {name}")
        checkpoint["model_class"] = class_path_of(type(pl_module))
        data = getattr(trainer, "datamodule", None)
        if data is not None:
            checkpoint["tokenizer"] = data.tokenizer
            checkpoint["data"] = {
                "class_path": class_path_of(type(data)),
                "init_args": {k: v for k, v in data.hparams.items() if k not in pl_module.hparams},
            }
            checkpoint["fingerprint"] = data.fingerprint


class BestCheckpoint(ModelCheckpoint):
    """`best.ckpt` by validation loss, and with each new best its bare weights as a plain dictionary.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        super().__init__(
            dirpath=run / "checkpoints",
            filename="best",
            monitor="val/loss",
            auto_insert_metric_name=False,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
        self.weights_path = run / WEIGHTS_NAME

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_fitting(trainer) and self.check_monitor_top_k(trainer, trainer.callback_metrics.get("val/loss")):
            _write_weights(trainer, pl_module, self.weights_path)  # first, since a resumed run may begin after both
        super().on_validation_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the best score when the run folder was moved, and forget it when only the checkpoint was."""
        here = Path(str(self.dirpath)) / "best.ckpt"
        if here.is_file():
            moved = {"dirpath": self.dirpath, "best_model_path": str(here), "kth_best_model_path": str(here)}
            scores = {str(here): score for score in state_dict["best_k_models"].values()}
            super().load_state_dict({**state_dict, **moved, "best_k_models": scores})


class LastCheckpoint(Callback):
    """`last.ckpt`: after every validation, once a minute, at the end, at a signal, and on an exception.

    It is only written between two optimizer steps, where nothing is half done. Place it right after its ExactResume.

    Args:
        run: the run's folder.
        resume: knows where the run stands.
        control: agrees with the other processes when to save and when to stop.
    """

    def __init__(self, run: Path, resume: ExactResume, control: Control) -> None:
        self.path = last_checkpoint(run)
        self.resume = resume
        self.control = control
        self._is_due = self._has_begun = False
        self._next_save = math.inf

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.control.is_training = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.control.is_training = True
        self._next_save = time.monotonic() + SECONDS_BETWEEN_SAVES

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._has_begun = True
        if not self.resume.is_between_steps:
            return
        if time.monotonic() >= self._next_save and trainer.is_global_zero:
            self._next_save = math.inf
            self.control.order(SAVE)
        order = self.control.reach()
        if (order is not None or self._is_due) and trainer.global_step > 0:
            self._save(trainer)
        self._stop_if(order, trainer)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.state.fn != "fit":
            return
        order = self.control.reach()
        if order and (self.resume.can_be_kept or trainer.sanity_checking):
            if self.resume.can_be_kept:
                self._save(trainer)
            self._stop_if(order, trainer)
        self.control.postpone(order)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_due = not trainer.sanity_checking

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["curves"] = sorted(file.name for file in self.path.parent.parent.glob(CURVES))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
        self._stop_if(self.control.end_training(), trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what was reached; if that fails too, say so beside the exception that ended the run."""
        if isinstance(exception, KeyboardInterrupt):
            say(f"stopped at once: {self.path} is from before" if self.path.exists() else "stopped at once, unkept")
        is_meant = isinstance(exception, Stopped | KeyboardInterrupt)
        is_hopeless = isinstance(exception, NotWrittenError) and str(self.path) in str(exception)
        is_alone = trainer.world_size == 1  # saving is collective, and the other ranks never arrive
        is_training = trainer.state.fn == "fit" and self._has_begun
        if is_training and self.resume.can_be_kept and is_alone and not (is_meant or is_hopeless):
            try:
                self._save(trainer)
                say(f"step {trainer.global_step} is kept in {self.path}")
            except InputError as error:
                say(f"the last step is not kept: {error}")
        self.control.is_training = False

    def _save(self, trainer: Trainer) -> None:
        start = time.monotonic()
        trainer.save_checkpoint(self.path, weights_only=False)
        now = time.monotonic()
        self._next_save = now + max(SECONDS_BETWEEN_SAVES, (now - start) / LARGEST_SHARE_OF_TIME)
        self._is_due = False

    def _stop_if(self, signum: int | None, trainer: Trainer) -> None:
        if signum:
            self.control.is_training, self.control.stops_for = False, signum
            step = trainer.global_step
            raise Stopped(signum, step, self.path if step else None)


class ConfigKeeper(Callback):
    """Writes `config.yaml` at the first batch, so that after a resume it holds the settings now in force.

    By then nothing can refuse them any more.
    """

    def __init__(self, path: Path, config: str) -> None:
        self.path = path
        self.config: str | None = config

    @rank_zero_only
    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        config, self.config = self.config, None
        if config is not None:
            replace_file(self.path, config.encode())


def _write_weights(trainer: Trainer, module: Any, path: Path) -> None:
    """Write `hyper_parameters`, the Transformer's `state_dict` and `tokenizer`, whole or not at all.

    All processes must call this: under fsdp2 the weights are gathered on rank 0, which writes them.
    """
    weights = trainer.strategy.lightning_module_state_dict()
    if not trainer.is_global_zero:
        return
    content = {
        "hyper_parameters": dict(module.hparams),
        "model_class": class_path_of(type(module)),
        "state_dict": {
            name.removeprefix("transformer."): value.cpu()
            for name, value in weights.items()
            if name.startswith("transformer.")
        },
        "tokenizer": getattr(getattr(trainer, "datamodule", None), "tokenizer", None),
    }
    DurableCheckpointIO().save_checkpoint(content, path)

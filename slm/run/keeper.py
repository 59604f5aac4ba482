"""What a run keeps of itself, and when: the best checkpoint, the last one, and what makes a copy of one whole."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from slm.durable import lock, replace_file, sweep
from slm.errors import InputError, NotWrittenError, check
from slm.messages import say
from slm.run.checkpoint import WEIGHTS_NAME, DurableCheckpointIO
from slm.run.resume import ExactResume, is_fitting
from slm.run.slurm import requeue_signals

SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
"""Ctrl-C, a scheduler, and a terminal that was closed; a job of SLURM hears `requeue_signals` too."""
CURVES = "events.out.tfevents.*"
SECONDS_BETWEEN_SAVES = 60.0
LARGEST_SHARE_OF_TIME = 0.01
"""What saving by the clock may cost: a save that takes long makes the next one wait."""


class Stopped(BaseException):
    """A signal ended the run; like KeyboardInterrupt it is no error, and no `except Exception` takes it for one.

    Attributes:
        signum: the signal.
        step: how many optimizer steps were done.
        path: the checkpoint to go on from; None where nothing is kept.
    """

    def __init__(self, signum: int, step: int, path: Path | None) -> None:
        kept = "which is kept" if path else "of which nothing is kept"
        where = f"at step {step}, {kept}" if step else "before its first step: nothing is lost"
        super().__init__(f"stopped by {signal.Signals(signum).name} {where}")
        self.signum, self.step, self.path = signum, step, path


@contextlib.contextmanager
def stopped_by_signals(progress: Callable[[], tuple[int, Path | None]]) -> Iterator[None]:
    """Raise `Stopped` where a signal of a scheduler comes before or after training, which has its own way to stop.

    Args:
        progress: says how many steps are done, and the checkpoint to go on from.
    """

    def stop(signum: int, frame: Any) -> None:
        raise Stopped(signum, *progress())

    heard = [signum for signum in (*SIGNALS, *requeue_signals()) if signal.getsignal(signum) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        heard = []
    for signum in heard:
        signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum in heard:
            signal.signal(signum, signal.SIG_DFL)


class SelfContained(Callback):
    """Adds to every checkpoint what a copy of it, alone, needs: which data it was trained on and its tokenizer."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        data = getattr(trainer, "datamodule", None)
        if data is not None:
            checkpoint["tokenizer"] = data.tokenizer
            checkpoint["data"] = {
                "class_path": f"{type(data).__module__}.{type(data).__qualname__}",
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


def hold(run: Path) -> IO[str]:
    """Hold a run's folder for as long as the file that is returned is open, or its process lives.

    Raises:
        InputError: another process holds it, or it cannot be written to.
    """
    try:
        file = (run / ".lock").open("w")
    except OSError as error:
        message = f"{run} cannot be written to: {error.strerror}; permit it, or copy the run to where you may write"
        raise InputError(message) from error
    try:
        lock(file)
    except BlockingIOError as error:
        raise InputError(f"{run} is being trained by another process: stop that first") from error
    return file


def begin(run: Path, config: str, tokenizer: str | None) -> None:
    """Put into the folder of a new run its settings and, where it is a `tokenizer.json`, its tokenizer."""
    replace_file(run / "config.yaml", config.encode())
    if tokenizer not in (None, "bytes"):
        replace_file(run / "tokenizer.json", tokenizer.encode())


def take_over(run: Path, content: Mapping[str, Any]) -> None:
    """Make the folder of a run that was stopped ready to go on from this content of a checkpoint.

    What a killed process left half-written is removed. So are the curves of a process that was killed before it saved
    anything, where it may have drawn the result of a validation that is still to be done: TensorBoard hides what lies
    past the step that a run goes on from, and this belongs to the very step. It is drawn once more.

    Raises:
        InputError: the folder cannot be written to.
    """
    kept = run / "checkpoints"
    check(os.access(kept, os.W_OK) or not kept.exists(), f"{kept} cannot be written to: permit it")
    sweep(run)
    sweep(kept)
    if content.get("position", {}).get("is_unvalidated"):
        for file in run.glob(CURVES):
            if file.name not in content.get("curves", []):
                file.unlink()


class LastCheckpoint(Callback):
    """`last.ckpt`: after every validation, once a minute, at the end, at a signal, and on an exception.

    It is only written between two optimizer steps, where nothing is half done. Place it right after its ExactResume.

    Args:
        run: the run's folder.
        resume: knows where the run stands.
    """

    def __init__(self, run: Path, resume: ExactResume) -> None:
        self.path = run / "checkpoints" / "last.ckpt"
        self.resume = resume
        self.is_due = False
        self.signum: int | None = None
        self._next_save = 0.0

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()
        self._next_save = time.monotonic() + SECONDS_BETWEEN_SAVES

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.resume.is_between_steps:
            is_wanted = self.is_due or self.signum is not None or time.monotonic() >= self._next_save
            if trainer.strategy.reduce_boolean_decision(is_wanted, all=False):
                if trainer.global_step > 0:
                    self._save(trainer)
                self._stop_if_asked(trainer)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Stop within a validation too, unless other devices must be waited for."""
        if trainer.state.fn == "fit" and trainer.world_size == 1 and self.signum is not None:
            if self.resume.can_be_kept:
                self._save(trainer)
            if self.resume.can_be_kept or trainer.sanity_checking:
                self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.is_due = not trainer.sanity_checking

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["curves"] = sorted(file.name for file in self.path.parent.parent.glob(CURVES))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep what was reached; a failure to do so is said beside the exception that ended the run."""
        if isinstance(exception, KeyboardInterrupt):
            say(f"stopped at once: {self.path} is from before" if self.path.exists() else "stopped at once, unkept")
        is_hopeless = isinstance(exception, Stopped | KeyboardInterrupt | NotWrittenError)
        others_wait = trainer.world_size > 1  # for ever, were this one to wait for them
        if trainer.state.fn == "fit" and self.resume.can_be_kept and not (is_hopeless or others_wait):
            try:
                self._save(trainer)
                say(f"step {trainer.global_step} is kept in {self.path}")
            except InputError as error:
                say(f"the last step is not kept: {error}")

    def _save(self, trainer: Trainer) -> None:
        start = time.monotonic()
        trainer.save_checkpoint(self.path, weights_only=False)
        now = time.monotonic()
        self._next_save = now + max(SECONDS_BETWEEN_SAVES, (now - start) / LARGEST_SHARE_OF_TIME)
        self.is_due = False

    def _listen(self) -> None:
        """Take the signals over from Lightning, which takes them after `on_fit_start` and gives them back."""
        if threading.current_thread() is threading.main_thread():
            for signum in (*SIGNALS, *requeue_signals()):
                if signal.getsignal(signum) != signal.SIG_IGN:  # as after nohup
                    signal.signal(signum, self._note)

    def _note(self, signum: int, frame: Any) -> None:
        if signum == signal.SIGINT and self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        if signum == signal.SIGINT:
            with contextlib.suppress(OSError):  # the terminal may have gone
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, without saving\n")

    def _stop_if_asked(self, trainer: Trainer) -> None:
        """Stop on all ranks for the same reason, whichever of them heard the signal."""
        heard = torch.tensor(self.signum or 0, device=trainer.strategy.root_device)
        signum = int(trainer.strategy.reduce(heard, reduce_op="max"))
        if signum:
            step = trainer.global_step
            raise Stopped(signum, step, self.path if step else None)


@rank_zero_only
def _write_weights(trainer: Trainer, module: Any, path: Path) -> None:
    """Write `hyper_parameters`, the Transformer's `state_dict` and `tokenizer`, whole or not at all."""
    content = {
        "hyper_parameters": dict(module.hparams),
        "state_dict": {name: value.cpu() for name, value in module.transformer.state_dict().items()},
        "tokenizer": getattr(getattr(trainer, "datamodule", None), "tokenizer", None),
    }
    DurableCheckpointIO().save_checkpoint(content, path)

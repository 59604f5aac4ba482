"""What ends a run from outside: the signals that are heard, and how they end it."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from slm.run.checkpoint import last_checkpoint
from slm.run.slurm import requeue_signals

SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
"""Ctrl-C, a scheduler, and a terminal that was closed; a job of SLURM hears `requeue_signals` too."""


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


@dataclass
class Progress:
    """How far a command has come.

    Attributes:
        trainer: which trains, once there is one.
        run: the folder of its run, where it has one.
    """

    trainer: Trainer | None = None
    run: Path | None = None

    def steps(self) -> int:
        """How many optimizer steps are done, those before a resume included."""
        return self.trainer.global_step if self.trainer else 0

    def last(self) -> Path | None:
        """The checkpoint to go on from."""
        path = None if self.run is None else last_checkpoint(self.run)
        return path if path and path.is_file() else None


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[Progress]:
    """Raise `Stopped` where a scheduler's signal comes before or after training, which has its own way to stop.

    What the body puts into the Progress that it is given says how far it has come.
    """
    progress = Progress()

    def stop(signum: int, frame: Any) -> None:
        raise Stopped(signum, progress.steps(), progress.last())

    heard = [signum for signum in (*SIGNALS, *requeue_signals()) if signal.getsignal(signum) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        heard = []
    for signum in heard:
        signal.signal(signum, stop)
    try:
        yield progress
    finally:
        for signum in heard:
            signal.signal(signum, signal.SIG_DFL)

"""What ends a run from outside: the signals that are heard, and how they end it."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch.distributed import DistError

from slm.errors import InputError, Stopped, leave_at_once
from slm.messages import is_first_process
from slm.run.checkpoint import last_checkpoint
from slm.run.control import LOST, SIGNALS, Control
from slm.run.processes import Processes

SECONDS_TO_NOTICE = 2.0
"""How soon the loss of a process is noticed after the first library that waited for it fails."""


@dataclass
class Progress:
    """How far a command has come.

    Attributes:
        control: agrees with the other processes when to stop.
        trainer: which trains, once there is one.
        run: the folder of its run, where it has one.
        stop: what ended it, where a signal has. Libraries may turn it into an error of their own.
    """

    control: Control = field(default_factory=lambda: Control(Processes()))
    trainer: Trainer | None = None
    run: Path | None = None
    stop: Stopped | None = None
    heard: set[int] = field(default_factory=set)

    def steps(self) -> int:
        """How many optimizer steps are done, those before a resume included."""
        return self.trainer.global_step if self.trainer else 0

    def last(self) -> Path | None:
        """The checkpoint to go on from."""
        path = None if self.run is None else last_checkpoint(self.run)
        return path if path and path.is_file() else None

    def hear(self, signum: int, frame: Any) -> None:
        """Stop at once, or in training at the next place where the run can be saved; a second Ctrl-C does not wait."""
        if self.control.stops_for is not None and self.control.processes.world_size > 1:
            return  # each of them tells the others
        if not self.control.is_training:
            self.control.stops_for = signum
            self.stop = self.stop or Stopped(signum, self.steps(), self.last())
            raise self.stop
        if signum == signal.SIGINT and signum in self.heard:
            raise KeyboardInterrupt
        self.heard.add(signum)
        if self.control.processes.world_size == 1:  # else a thread has heard it too
            self.control.order(signum)
        if signum == signal.SIGINT and is_first_process():
            with contextlib.suppress(OSError):  # the terminal may have gone
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, without saving\n")


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[Progress]:
    """Let the signals end the body, as what it puts into the Progress that it is given says.

    A launcher keeps them back from the processes that it starts until they are heard here.
    """
    progress = Progress()
    heard = [signum for signum in SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]  # as after nohup
    if threading.current_thread() is not threading.main_thread():
        heard = []
    before = {signum: signal.signal(signum, progress.hear) for signum in heard}
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)
    try:
        yield progress
    except (KeyboardInterrupt, SystemExit) as error:
        progress.control.has_failed = bool(getattr(error, "code", True))
        raise
    except Exception as error:
        progress.control.has_failed = True
        if progress.stop is None and progress.control.leaves_for is not None:
            progress.stop = Stopped(progress.control.leaves_for, progress.steps(), progress.last())
        if progress.stop is not None:
            raise progress.stop from error
        if _is_told_elsewhere(error, progress.control):
            leave_at_once(LOST)
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        progress.control.close()


def _is_told_elsewhere(error: Exception, control: Control) -> bool:
    """Whether another rank reports this error, or the one that it comes of."""
    processes = control.processes
    if processes.world_size == 1 or (processes.rank == 0 and isinstance(error, InputError)):
        return False
    return isinstance(error, DistError) or control.has_lost_another(SECONDS_TO_NOTICE)

"""What ends a command: the errors that speak to the user, and a signal."""

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that names it, its value and the remedy.

    The command line prints it as `error: ...` and exits with status 2. Every other exception is a bug and keeps its
    traceback.
    """


class NotFiniteError(InputError):
    """A loss, a gradient or a weight is not finite; raised before the optimizer, or a checkpoint, takes it over.

    Args:
        what: the step, what is not finite, and its value.
    """

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} is not finite: lower --model.learning_rate or look at the data; what was kept is finite, and "
            "where it leads here again, --ckpt_path best is from before"
        )


class NotWrittenError(InputError):
    """A file cannot be written; what stood there is untouched."""


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


def check(condition: bool, message: str) -> None:
    """Raise InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)


def leave_at_once(status: int) -> NoReturn:
    """Exit without destroying the process group, which could wait for ranks that are gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)

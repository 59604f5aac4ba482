"""How a command ends: its exit status and its last line."""

import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch

from slm.command.streams import failure_to_print, standard_streams
from slm.errors import InputError, Stopped, leave_at_once
from slm.messages import is_first_process, say
from slm.run.job import is_slurm_job, requeue


@contextmanager
def ends_in_one_line() -> Iterator[None]:
    """Turn what ends a command into one line on stderr and an exit status.

    A user's mistake is status 2, and SLM_TRACEBACK=1 shows where it came from; SIGTERM is 143 and Ctrl-C 130, as a
    shell or a scheduler expects. Any other exception is a bug and passes. A message that cannot be printed changes
    nothing; a result that cannot ends the command with status 1, as it does `cat`.
    """
    with standard_streams():
        stop: SystemExit | None = None
        try:
            with _status_of_every_ending():
                yield
        except SystemExit as error:  # --help ends so, too
            stop = error
        except Exception:
            if failure_to_print() is None:
                raise
        if not (stop and stop.code) and (failure := failure_to_print()):
            if isinstance(failure, BrokenPipeError):  # the reader of the output has gone, as `head` does
                sys.exit(128 + 13)  # SIGPIPE, which Windows does not name
            say(f"error: the output cannot be written: {failure.strerror}")
            sys.exit(1)
        if stop is not None:
            raise stop


@contextmanager
def _status_of_every_ending() -> Iterator[None]:
    try:
        yield
    except Stopped as stop:
        say(
            f"{stop}; go on with {command_name()} --ckpt_path {shlex.quote(str(stop.path))}" if stop.path else str(stop)
        )
        is_to_go_on = stop.path is not None or stop.step == 0
        is_near_its_end = is_slurm_job() and signal.Signals(stop.signum).name == "SIGUSR1"
        if is_near_its_end and is_to_go_on and is_first_process():
            requeue()
        _leave(128 + stop.signum)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
            _leave(128 + signal.SIGINT)  # Lightning makes it SystemExit(1)
        raise
    except Exception as error:
        if not _is_meant_for_the_user(error) or os.environ.get("SLM_TRACEBACK"):
            _leave_with_traceback()
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        _leave(2)


def command_name() -> str:
    """How this process was started, without its arguments, as its user would type it again."""
    return shlex.join(sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1])


def python_name() -> str:
    """The Python that runs this process, as its user typed it."""
    return sys.orig_argv[0]


def _leave_with_traceback() -> None:
    """Leave for the error that is being handled, where a process group is there; else it is for Python to show."""
    if _has_process_group():
        traceback.print_exc()
        leave_at_once(1)


def _leave(status: int) -> NoReturn:
    if _has_process_group():
        leave_at_once(status)
    sys.exit(status)


def _has_process_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_meant_for_the_user(error: Exception) -> bool:
    """Whether it is ours, or Lightning's own for settings that do not fit; anything else is a bug."""
    if isinstance(error, InputError) or type(error).__name__ == "MisconfigurationException":
        return True
    module = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    return isinstance(error, ValueError | RuntimeError) and module.startswith("lightning.")

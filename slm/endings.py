"""How a command ends: its exit status and its last line."""

import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException

from slm.errors import InputError
from slm.keeper import Stopped
from slm.notices import say


@contextmanager
def ends_in_one_line() -> Iterator[None]:
    """Turn what ends a command into one line on stderr and an exit status.

    A user's mistake is status 2, and SLM_TRACEBACK=1 shows where it came from; SIGTERM is 143 and Ctrl-C 130, as a
    shell or a scheduler expects. Any other exception is a bug and passes.
    """
    try:
        yield
        _leave_process_group()
    except Stopped as stop:
        _leave_process_group()
        say(f"{stop}; go on with {command()} --ckpt_path {shlex.quote(str(stop.path))}" if stop.path else str(stop))
        sys.exit(128 + stop.signum)
    except SIGTERMException:
        sys.exit(128 + signal.SIGTERM)
    except BrokenPipeError:  # the reader of the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)  # SIGPIPE, which Windows does not name
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
            sys.exit(128 + signal.SIGINT)  # Lightning makes it SystemExit(1)
        raise
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        is_meant = isinstance(error, InputError | MisconfigurationException) or _is_raised_by_lightning(error)
        if not is_meant or os.environ.get("SLM_TRACEBACK"):
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def command() -> str:
    """How this process was started, without its arguments, as its user would type it again."""
    return shlex.join(sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1])


def _leave_process_group() -> None:
    """Join the threads of a process group, as Lightning does for NCCL alone.

    One of gloo's that lets go of its last tensor while the interpreter shuts down aborts the process, now and then.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _is_raised_by_lightning(error: BaseException) -> bool:
    """Whether Lightning itself raised this, as it does for settings that do not fit; anything else is a bug."""
    module = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    return module.startswith("lightning.")

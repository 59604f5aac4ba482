"""A page to look inside a trained model: `python -m slm.look --ckpt_path best`."""

import errno
import socket
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from slm.command.exit_codes import ends_in_one_line
from slm.command.flags import new_parser, parse_flags
from slm.errors import InputError, check
from slm.hardware import prepare_cpu, writing_device
from slm.messages import say

HOST = "127.0.0.1"


def look(ckpt_path: str | Path = "best", accelerator: str = "auto", port: int = 6060, show: bool = True) -> None:
    """Serve a page about a model to this machine alone, until Ctrl-C.

    Args:
        ckpt_path: `last` or `best` (of the newest run under `runs/`), a run folder (its best), a `.ckpt` or a `.pt`.
        accelerator: where it computes: cpu, cuda, mps, or the GPU that is there (auto).
        port: of the page's address.
        show: whether a browser is opened.

    Raises:
        InputError: there is no such checkpoint or accelerator, the port is taken, or NiceGUI is not installed.
    """
    check(1 <= port < 2**16, f"port={port} must be at least 1 and below {2**16}")
    check_free(port)
    device = writing_device(accelerator)
    check(find_spec("nicegui") is not None, 'the page needs the package nicegui: pip install -e ".[look]"')
    from slm.page.checkpoints import Checkpoint
    from slm.page.serve import serve

    checkpoint = Checkpoint(ckpt_path, device)
    say(f"http://{HOST}:{port} shows {checkpoint.path}; Ctrl-C ends it")
    serve(checkpoint, HOST, port, show)


def check_free(port: int) -> None:
    """Raise InputError where another program listens at a port of this machine, or it may not be used."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: one that has ended is gone
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise InputError(f"port={port} is taken: give another, such as --port {port + 1}") from error
            raise InputError(
                f"port={port} cannot be used: {error.strerror}; give another, such as --port 6060"
            ) from error


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = new_parser("look")
    parser.add_function_arguments(look)
    prepare_cpu()
    with ends_in_one_line():
        look(**vars(parse_flags(parser, argv)))


if __name__ == "__main__":
    main()

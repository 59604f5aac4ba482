"""Standard streams that no message can break, and that tell when a result could not be printed."""

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Output(io.FileIO):
    """The descriptor of a standard stream, below its buffer.

    What is optional is dropped where it cannot be written: a terminal was closed, a disk is full, a reader has gone.
    Anything else raises the system's error once, and is dropped from then on.

    Args:
        descriptor: 1 or 2.
        is_optional: whether only messages are printed.
        is_closed: whether this process was started without it.
    """

    def __init__(self, descriptor: int, is_optional: bool, is_closed: bool = False) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.is_optional = is_optional
        self.is_closed = is_closed
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            if self.is_closed:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            while left:
                written = super().write(left)
                if written is None:  # it does not block: another program has set it so
                    select.select([], [self], [])
                left = left[written or 0 :]
        except OSError as error:
            if not self.is_optional:
                self.failure, self.is_optional = error, True
                raise
        return size


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Let stdout and stderr be ones on which an `Output` decides, and which can print any text.

    What the encoding of a stream lacks is written as an escape. Streams that are no files, such as those of a notebook,
    are left as they are.
    """
    before = sys.stdout, sys.stderr
    _occupy(0)
    after = _replaced(sys.stdout, 1, is_optional=False), _replaced(sys.stderr, 2, is_optional=True)
    sys.stdout, sys.stderr = after
    try:
        yield
    finally:
        for stream in after:
            with contextlib.suppress(OSError):
                stream.flush()
        sys.stdout, sys.stderr = before
        for original, stream in zip(before, after, strict=True):
            if original is not None and original is not stream:
                _empty(original)


def print_only_messages() -> None:
    """From here on this process prints only messages, and a failure to print one is ignored."""
    if (output := _output_of(sys.stdout)) is not None:
        output.is_optional = True


def failure_to_print() -> OSError | None:
    """The error that kept a result from being printed; None if there was none."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    output = _output_of(sys.stdout)
    return None if output is None else output.failure


def _replaced(stream: TextIO | None, descriptor: int, is_optional: bool) -> TextIO:
    if stream is None:
        _occupy(descriptor)
        output = Output(descriptor, is_optional, is_closed=True)
        return io.TextIOWrapper(io.BufferedWriter(output), "utf-8", "backslashreplace", newline="")
    if not (isinstance(stream, io.TextIOWrapper) and isinstance(_raw_of(stream), io.FileIO)):
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    output = Output(stream.fileno(), is_optional)
    is_buffered = _raw_of(stream) is not stream.buffer
    return io.TextIOWrapper(
        io.BufferedWriter(output) if is_buffered else output,
        stream.encoding,
        "backslashreplace",
        newline="",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _raw_of(stream: Any) -> Any:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _output_of(stream: Any) -> Output | None:
    raw = _raw_of(stream)
    return raw if isinstance(raw, Output) else None


def _occupy(descriptor: int) -> None:
    """Open a standard descriptor that is closed: else the next file opened would get its number and what is printed."""
    try:
        os.fstat(descriptor)
    except OSError:
        found = os.open(os.devnull, os.O_RDWR)
        if found != descriptor:
            os.dup2(found, descriptor)
            os.close(found)


def _empty(stream: TextIO) -> None:
    """Drop what a library's logger could not print: it would make the interpreter fail at its end."""
    try:
        stream.flush()
    except OSError:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
        stream.flush()

"""Files that are there whole or not at all, whatever kills the process or fills the disk."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from slm.errors import NotWrittenError
from slm.messages import say

TEMPORARY = ".unfinished"
"""The suffix of a file that is being written; one that is found at the start of a run is what a kill left."""


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that at every instant, power cuts included, the old content or the new one is there whole.

    Raises:
        NotWrittenError: it cannot be; the old content is untouched and nothing is left beside it.
    """
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """The same for a file that is written in the body, which an exception there leaves as it was.

    Raises:
        NotWrittenError: it cannot be written.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise NotWrittenError(
            f"{path} cannot be written: {error.strerror}; what was there is untouched: make room, or permit writing"
        ) from error
    _fsync_folder(path.parent)


def give_usual_modes(folder: Path) -> None:
    """Give the files of a folder the permissions of any new file: the safetensors library makes its own private."""
    probe = folder / f"mode{TEMPORARY}"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(mode & 0o777)


def lock(file: IO[str], waits: bool = False) -> None:
    """Hold the lock of a file until that is closed or this process ends; workers of it do not inherit the lock.

    Where the file system has no locks, as NFS may not, it says so and goes on without.

    Raises:
        BlockingIOError: another process holds it, and this one does not wait.
    """
    if fcntl is None:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise BlockingIOError from error
        folder = Path(file.name).parent
        say(f"{folder} cannot be locked ({error.strerror}): let nothing else write there at the same time")


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let no other process into the body that would write in the same folder; it waits, and says so.

    Raises:
        NotWrittenError: the folder cannot be made, or not be written to.
    """
    lock_file = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = lock_file.open("w")
        try:
            lock(file)
        except BlockingIOError:
            say(f"another process writes in {folder}: waiting for it")
            lock(file, waits=True)
    except OSError as error:
        remedy = "make room or permit writing there, or set XDG_CACHE_HOME to another folder"
        raise NotWrittenError(f"{lock_file} cannot be written: {error.strerror}; {remedy}") from error
    with file:
        yield


def _fsync_folder(folder: Path) -> None:
    """Make the new name durable too, where the system can open a folder and the file system knows how."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove the half-written files that a killed process left in a folder."""
    for leftover in folder.glob(f"*{TEMPORARY}"):
        if leftover.is_file():
            leftover.unlink()

"""Text, on disk or inside Python, as one stream of byte tokens; what is on disk is prepared once and memory-mapped."""

import codecs
import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

from slm.durable import replacing
from slm.errors import InputError, check

NUM_BYTES = 256
END_OF_TEXT = 0xFF
"""The id that closes every document: a byte that UTF-8 never contains."""
FORMAT = 1
"""Of a prepared file: the tokens, then their digest."""
DIGEST_SIZE = 16
BLOCK_SIZE = 2**24
SECONDS_OF_DOUBT = 2.0
"""A text may change once more within the resolution of its time, so one that was prepared sooner is prepared again."""


def byte_stream(path: str | None) -> tuple[Tensor, bytes]:
    """The documents under `path` as byte tokens (N,), uint8, each closed by END_OF_TEXT; and the digest of the tokens.

    `path` is a UTF-8 text file, or a folder whose files are read recursively in the order of their names; hidden ones
    are passed over. They are read once, into a file under `cache_folder()` that is named by their places, sizes and
    times; from then on that file is mapped into memory, which takes no time and no memory, whatever its size. None
    takes the English documentation that every Python carries (`pydoc_data.topics`).

    Raises:
        InputError: no such file, nothing in it, a file that cannot be read, is not UTF-8 or changes while it is read.
        NotWrittenError: the prepared file cannot be written.
    """
    if path is None:
        content = b"".join(text.encode() + bytes([END_OF_TEXT]) for _, text in sorted(topics.items()))
        return torch.frombuffer(bytearray(content), dtype=torch.uint8), _new_digest(content).digest()
    files = _files(Path(path).absolute())
    states = [_state(file) for file in files]
    key = _new_digest(repr((FORMAT, states)).encode()).hexdigest()
    prepared = cache_folder() / f"{key}.bytes"
    newest = max(seconds for *_, seconds in states) / 1e9
    if not prepared.is_file() or prepared.stat().st_mtime < newest + SECONDS_OF_DOUBT:
        _prepare(files, states, prepared, path)
    with prepared.open("rb") as file:
        size = file.seek(-DIGEST_SIZE, os.SEEK_END)
        digest = file.read()
    return torch.from_file(str(prepared), shared=False, size=size, dtype=torch.uint8), digest


def cache_folder() -> Path:
    """Where prepared texts are kept; any of them may be deleted when no run is using it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slm"


def _prepare(files: list[Path], states: list[tuple[str, int, int]], prepared: Path, path: str) -> None:
    digest, is_empty = _new_digest(), True
    with replacing(prepared, writer=f".{os.getpid()}") as out:
        for file in files:
            for block in _utf8_blocks(file):
                is_empty = is_empty and not block
                digest.update(block)
                out.write(block)
            digest.update(bytes([END_OF_TEXT]))
            out.write(bytes([END_OF_TEXT]))
        check(not is_empty, f"data.path={path} holds no text at all")
        for file, state in zip(files, states, strict=True):
            check(_state(file) == state, f"{file} changed while it was read: start again when nothing writes to it")
        out.write(digest.digest())


def _new_digest(content: bytes = b"") -> blake2b:
    return blake2b(content, digest_size=DIGEST_SIZE)


def _state(file: Path) -> tuple[str, int, int]:
    """Its place, its size and when it was last changed, in nanoseconds."""
    try:
        status = file.stat()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    return str(file), status.st_size, status.st_mtime_ns


def _files(path: Path) -> list[Path]:
    check(path.exists(), f"data.path={path}: there is no such file or folder")
    if path.is_file():
        return [path]
    found = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    visible = [found[name] for name in sorted(found) if not any(part.startswith(".") for part in name.split("/"))]
    check(bool(visible), f"data.path={path}: the folder holds no files; give a text file or a folder of text files")
    return visible


def _utf8_blocks(file: Path) -> Iterator[bytes]:
    decoder, offset, start = codecs.getincrementaldecoder("utf-8")(), 0, b""
    try:
        with file.open("rb") as text:
            while True:
                block = text.read(BLOCK_SIZE)
                begun = decoder.getstate()[0]  # the bytes of a character that the last block ended within
                start = start or block
                decoder.decode(block, final=not block)
                if not block:
                    return
                yield block
                offset += len(block)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        kind = "a binary file" if b"\0" in block else "not UTF-8 text"
        kind = "UTF-16 text" if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else kind
        raise InputError(
            f"{file} is {kind}: byte 0x{error.object[error.start]:02x} at offset {offset - len(begun) + error.start}; "
            "convert it to UTF-8, or point --data.path at text"
        ) from error

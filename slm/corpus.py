"""Text, on disk or inside Python, as one stream of byte tokens."""

from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

from slm.errors import InputError, check

NUM_BYTES = 256
END_OF_TEXT = 0xFF
"""The id that closes every document: a byte that UTF-8 never contains."""


def byte_stream(path: str | None) -> Tensor:
    """The documents under `path` as byte tokens (N,), uint8, each closed by END_OF_TEXT.

    `path` is a UTF-8 text file, or a folder whose files are read recursively in the order of their names; hidden ones
    are passed over. None takes the English documentation that every Python carries (`pydoc_data.topics`).

    Raises:
        InputError: no such file, nothing in it, a file that cannot be read or is not UTF-8.
    """
    documents = _python_documentation() if path is None else [_read_utf8(file) for file in _files(Path(path))]
    check(any(documents), f"data.path={path} holds no text at all")
    return torch.frombuffer(bytearray(b"".join(text + bytes([END_OF_TEXT]) for text in documents)), dtype=torch.uint8)


def _python_documentation() -> list[bytes]:
    return [text.encode() for _, text in sorted(topics.items())]


def _files(path: Path) -> list[Path]:
    check(path.exists(), f"data.path={path}: there is no such file or folder")
    if path.is_file():
        return [path]
    found = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    visible = [found[name] for name in sorted(found) if not any(part.startswith(".") for part in name.split("/"))]
    check(bool(visible), f"data.path={path}: the folder holds no files; give a text file or a folder of text files")
    return visible


def _read_utf8(file: Path) -> bytes:
    try:
        content = file.read_bytes()
        content.decode("utf-8")
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        kind = "a binary file" if b"\0" in content else "not UTF-8 text"
        kind = "UTF-16 text" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else kind
        raise InputError(
            f"{file} is {kind}: byte 0x{content[error.start]:02x} at offset {error.start}; "
            "convert it to UTF-8, or point --data.path at text"
        ) from error
    return content

"""Streams of tokens that were prepared once: where they are kept, what is known of them, and how they are mapped."""

import dataclasses
import json
import os
import struct
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from slm.data.files import Entry
from slm.errors import InputError
from slm.messages import say

MARK = b"slm\x02"
"""Ends a prepared file, with the number of its format: the tokens; the facts, as JSON; its length; this."""
ENDING = struct.Struct("<I4s")
SECONDS_OF_DOUBT = 2.0
"""A text may change once more within the resolution of its time, so one that was prepared sooner is prepared again."""
DTYPES = {"B": torch.uint8, "H": torch.uint16, "I": torch.uint32}


@dataclass(frozen=True)
class Facts:
    """What is known of a stream.

    Attributes:
        num_tokens: with those that close each document.
        typecode: of a token, as `array` has it.
        digest: of the tokens, in hexadecimal.
        begun: when, in nanoseconds of the file system's clock, the reading of its text began.
        num_documents: those that are not empty; None where it is not known.
        num_bytes: of the text as UTF-8; None where it is not known.
        num_replaced: places that were no text.
        is_exact: whether the tokens give the text back as it was.
        largest: the largest token; None where the tokenizer makes no other.
        largest_at: where that is, counted in tokens.
    """

    num_tokens: int
    typecode: str
    digest: str
    begun: int
    num_documents: int | None = None
    num_bytes: int | None = None
    num_replaced: int = 0
    is_exact: bool = True
    largest: int | None = None
    largest_at: int = 0

    def footer(self) -> bytes:
        """What ends the prepared file."""
        content = json.dumps(dataclasses.asdict(self)).encode()
        return content + ENDING.pack(len(content), MARK)


def cache_folder() -> Path:
    """Where prepared texts are kept; any of them may be deleted when no run is using it.

    Raises:
        InputError: there is no home folder, as in a container for a user without a name.
    """
    chosen = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(chosen) if chosen else Path.home() / ".cache") / "slm"
    except RuntimeError as error:
        message = "there is no home folder for prepared texts: set XDG_CACHE_HOME to a folder that can be written to"
        raise InputError(message) from error


def new_digest(content: bytes = b"") -> blake2b:
    return blake2b(content, digest_size=16)


def place_of(suffix: str, *what: object) -> Path:
    """The file in the cache that is named by what goes into it."""
    return cache_folder() / f"{new_digest(repr(what).encode()).hexdigest()}{suffix}"


def has_seen(begun: int, entries: list[Entry]) -> bool:
    """Whether what was begun then, in nanoseconds, saw the files as they are; one of a later time has another clock."""
    return not any(entry.changed <= begun < entry.changed + SECONDS_OF_DOUBT * 1e9 for entry in entries)


def known_facts(prepared: Path, entries: list[Entry], has_tokens: bool = True) -> Facts | None:
    """What a prepared file says of its stream; None where it must be made, or made again.

    Raises:
        InputError: it cannot be read.
    """
    try:
        if not prepared.is_file():
            return None
        with prepared.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - ENDING.size))
            length, mark = ENDING.unpack(file.read().rjust(ENDING.size))
            if mark != MARK and mark[:3] == MARK[:3]:
                say(f"{prepared} was made by another version: it is made again")
                return None
            file.seek(max(0, size - length - ENDING.size))
            facts = Facts(**json.loads(file.read(length))) if mark == MARK else None
    except OSError as error:
        raise InputError(f"{prepared} cannot be read: {error.strerror}; delete it, or set XDG_CACHE_HOME") from error
    except (ValueError, TypeError):
        facts = None
    if facts is not None:
        tokens = facts.num_tokens * DTYPES[facts.typecode].itemsize if has_tokens else 0
    if facts is None or size != tokens + length + ENDING.size:
        say(f"{prepared} is damaged: it is made again")
        return None
    return facts if has_seen(facts.begun, entries) else None


def map_tokens(file: Path, facts: Facts) -> Tensor:
    """The tokens (N,) at the beginning of a file, which stay there until they are used."""
    return torch.from_file(str(file), shared=False, size=facts.num_tokens, dtype=DTYPES[facts.typecode])

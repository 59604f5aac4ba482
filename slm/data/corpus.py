"""A text as one memory-mapped stream of tokens, prepared once and kept in a folder for caches."""

import dataclasses
import itertools
import json
import math
import os
import struct
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from slm.data.documents import Block, read_blocks
from slm.data.files import Entry, Text, check_unchanged
from slm.data.tokenizer import PIECE_SIZE, SubwordTokenizer, Tokenizer, cut, read_tokenizer, train_bpe
from slm.durable import alone_in, replace_file, replacing, sweep
from slm.errors import InputError, check
from slm.messages import say

Found = TypeVar("Found")
BATCH_SIZE = 2**22
"""Characters, or tokens, that are in memory at once."""
READING = 2
"""Version of the reader: a change makes every cached text be read again."""
TRAINING_SIZE = 16 * 10**6
"""Characters of text, spread evenly over it, that the merges of BPE are learned from: all of a smaller text.

Learning takes up to 60 times as many bytes of memory, where no word comes twice.
"""
MARK = b"slm\x02"
"""Ends a prepared file, which holds the tokens, the facts as JSON, their length, and this with its format's number."""
ENDING = struct.Struct("<I4s")
SECONDS_OF_DOUBT = 2.0
"""File timestamps are coarse: distrust what was prepared within this time after a change of its text."""
DTYPES = {"B": torch.uint8, "H": torch.uint16, "I": torch.uint32}


@dataclass(frozen=True)
class Facts:
    """What is known of a stream; None stands for what is not known."""

    num_tokens: int
    """Tokens, those that close a document included."""
    typecode: str
    """Type of a token, as a code of the `array` module."""
    digest: str
    """BLAKE2b of the tokens, in hexadecimal."""
    begun: int
    """When the reading of its text began, in nanoseconds of the file system's clock."""
    num_documents: int | None = None
    """Documents that are not empty."""
    num_bytes: int | None = None
    """Bytes of the text as UTF-8."""
    num_replaced: int = 0
    """Places that were no text."""
    is_exact: bool = True
    """Whether the tokens give the text back as it was."""
    largest: int | None = None
    """The largest token of a file that another program made."""
    largest_at: int = 0
    """Where that is, counted in tokens."""

    def footer(self) -> bytes:
        """What ends the prepared file."""
        content = json.dumps(dataclasses.asdict(self)).encode()
        return content + ENDING.pack(len(content), MARK)


def token_stream(text: Text, tokenizer: Tokenizer) -> tuple[Tensor, Facts]:
    """The documents of a text as tokens (N,), each document closed by the tokenizer's end of text.

    They are read once, into a file in the cache that is named by the places, sizes and times of the files and by the
    tokenizer. From then on that file is mapped into memory, which takes no time and no memory, whatever its size.

    Raises:
        InputError: there is nothing in it, a file is not what its name says, or a file changes while it is read.
        NotWrittenError: the prepared file cannot be written.
    """
    prepared = _place(".tokens", READING, text.entries, text.text_field, text.errors, tokenizer.dump())
    facts = _once(lambda: _kept_facts(prepared, text.entries), lambda: _prepare(text, tokenizer, prepared))
    return _map(prepared, facts), facts


def saved_tokens(text: Text) -> tuple[Tensor, Facts]:
    """The tokens (N,), uint16, of a file that nanoGPT's scripts make, mapped as it is; it is read through once.

    Raises:
        InputError: the file is empty, or no whole number of tokens.
        NotWrittenError: what is known of it cannot be kept.
    """
    [entry] = text.entries
    check(entry.size > 0, f"{entry.path} is empty: it must hold two bytes for each token")
    check(
        entry.size % 2 == 0, f"{entry.path} has {entry.size} bytes, an odd number: tokens of two bytes were cut short"
    )
    kept = _place(".facts", text.entries)
    facts = _once(lambda: _kept_facts(kept, text.entries, has_tokens=False), lambda: _look_through(entry, kept))
    return _map(Path(entry.path), facts), facts


def own_bpe(text: Text, vocab_size: int, share: float = 1.0) -> SubwordTokenizer:
    """Byte-level BPE whose merges are learned from the first `share` of a text, counted in characters, once.

    Raises:
        InputError: see `token_stream` and `train_bpe`.
        NotWrittenError: the tokenizer cannot be kept.
    """
    kept = _place(".json", READING, text.entries, text.text_field, text.errors, vocab_size, share, TRAINING_SIZE)
    return _once(lambda: _kept_bpe(kept, text.entries), lambda: _learn_bpe(text, vocab_size, share, kept))


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


def _place(suffix: str, *what: object) -> Path:
    """The file in the cache that is named by what goes into it."""
    return cache_folder() / f"{_digest(repr(what).encode()).hexdigest()}{suffix}"


def _digest(content: bytes = b"") -> blake2b:
    return blake2b(content, digest_size=16)


def _once(find: Callable[[], Found | None], make: Callable[[], Found]) -> Found:
    """What is in the cache, else what is put there, by one process at a time."""
    found = find()
    if found is None:
        with alone_in(cache_folder()):
            sweep(cache_folder())
            found = find()  # another process may have made it meanwhile
            if found is None:
                found = make()
    return found


def _has_seen(begun: int, entries: list[Entry]) -> bool:
    """Whether what was begun then saw the files as they are. A file from later has another clock, and is believed."""
    return not any(entry.changed <= begun < entry.changed + SECONDS_OF_DOUBT * 1e9 for entry in entries)


def _kept_facts(kept: Path, entries: list[Entry], has_tokens: bool = True) -> Facts | None:
    """What a file in the cache says of its stream; None if it must be made, or made again."""
    if not kept.is_file():
        return None
    try:
        with kept.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - ENDING.size))
            length, mark = ENDING.unpack(file.read().rjust(ENDING.size))
            file.seek(max(0, size - length - ENDING.size))
            facts = Facts(**json.loads(file.read(length)))
        tokens = facts.num_tokens * DTYPES[facts.typecode].itemsize if has_tokens else 0
        is_whole = mark == MARK and size == tokens + length + ENDING.size
    except OSError as error:
        raise InputError(f"{kept} cannot be read: {error.strerror}; delete it, or set XDG_CACHE_HOME") from error
    except (ValueError, TypeError):
        is_whole = False
    if not is_whole:
        say(f"{kept} is damaged, or of another version: it is made again")
        return None
    return facts if _has_seen(facts.begun, entries) else None


def _kept_bpe(kept: Path, entries: list[Entry]) -> SubwordTokenizer | None:
    if not (kept.is_file() and _has_seen(kept.stat().st_mtime_ns, entries)):
        return None
    try:
        return read_tokenizer(kept)
    except InputError:
        say(f"{kept} is damaged: it is made again")
        return None


def _map(file: Path, facts: Facts) -> Tensor:
    """The tokens (N,) at the beginning of a file, which stay there until they are used."""
    return torch.from_file(str(file), shared=False, size=facts.num_tokens, dtype=DTYPES[facts.typecode])


def _learn_bpe(text: Text, vocab_size: int, share: float, kept: Path) -> SubwordTokenizer:
    begun = time.time_ns()
    size = sum(len(block.text) for block in read_blocks(text, "measuring"))
    check(size > 0, f"{text} holds no text at all")
    pieces = _first(_pieces(read_blocks(text, f"learning {vocab_size} ids")), int(share * size))
    sample = itertools.islice(pieces, 0, None, max(1, math.ceil(share * size / TRAINING_SIZE)))
    tokenizer = train_bpe(sample, vocab_size)
    replace_file(kept, tokenizer.dump().encode())
    os.utime(kept, ns=(begun, begun))
    return tokenizer


def _prepare(text: Text, tokenizer: Tokenizer, prepared: Path) -> Facts:
    digest, num_tokens, num_documents, num_bytes, num_replaced, is_exact = _digest(), 0, 0, 0, 0, True

    def counted(blocks: Iterable[Block]) -> Iterator[Block]:
        nonlocal num_replaced
        for block in blocks:
            num_replaced += block.num_replaced
            yield block

    with replacing(prepared) as out:
        begun = os.fstat(out.fileno()).st_mtime_ns
        for pieces in _batches(_pieces(counted(read_blocks(text, "preparing")))):
            ids = tokenizer.encode(pieces)
            digest.update(ids)
            out.write(ids)
            num_tokens += len(ids) // array(tokenizer.typecode).itemsize
            num_documents += sum(is_last for _, is_last in pieces)
            num_bytes += sum(len(piece.encode()) for piece, _ in pieces)
            is_exact = is_exact and (tokenizer.is_exact or _is_given_back(tokenizer, pieces, ids))
        check(num_bytes > 0, f"{text} holds no text at all")
        facts = Facts(
            num_tokens, tokenizer.typecode, digest.hexdigest(), begun, num_documents, num_bytes, num_replaced, is_exact
        )
        out.write(facts.footer())
    return facts


def _is_given_back(tokenizer: Tokenizer, pieces: Sequence[tuple[str, bool]], ids: bytes) -> bool:
    """Whether the tokens of each document, as far as it is here, are its text again."""
    documents: list[list[int]] = [[]]
    for token in array(tokenizer.typecode, ids):
        if token == tokenizer.end_of_text:
            documents.append([])
        else:
            documents[-1].append(token)
    texts = [""]
    for piece, is_last in pieces:
        texts[-1] += piece
        if is_last:
            texts.append("")
    back = [tokenizer.decode(document) for document in documents]
    return (back[0].lstrip(" "), back[1:]) == (texts[0].lstrip(" "), texts[1:])  # the first may begin in its middle


def _look_through(entry: Entry, kept: Path) -> Facts:
    digest, largest, largest_at = _digest(), -1, 0
    with replacing(kept) as out:
        begun = os.fstat(out.fileno()).st_mtime_ns
        stream = torch.from_file(entry.path, shared=False, size=entry.size // 2, dtype=torch.uint16)
        for start in range(0, len(stream), BATCH_SIZE):
            chunk = stream[start : start + BATCH_SIZE]
            digest.update(chunk.numpy().data)
            value, index = chunk.int().max(0)
            if value > largest:
                largest, largest_at = int(value), start + int(index)
        check_unchanged(entry)
        facts = Facts(len(stream), "H", digest.hexdigest(), begun, largest=largest, largest_at=largest_at)
        out.write(facts.footer())
    return facts


def _pieces(blocks: Iterable[Block]) -> Iterator[tuple[str, bool]]:
    """The text in pieces of PIECE_SIZE characters at most, each with whether its document ends with it."""
    pending = ""
    is_begun = False
    for block in blocks:
        pending += block.text
        start = 0
        while len(pending) - start > PIECE_SIZE:
            stop = cut(pending, start)
            yield pending[start:stop], False
            start, is_begun = stop, True
        pending = pending[start:]
        if block.is_last:
            if pending or is_begun:  # else it is empty
                yield pending, True
            pending, is_begun = "", False


def _first(pieces: Iterable[tuple[str, bool]], size: int) -> Iterator[str]:
    """The first `size` characters."""
    for piece, _ in pieces:
        if size <= 0:
            return
        yield piece[:size]
        size -= len(piece)


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0]) + 1
        if size >= BATCH_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch

"""Text, on disk or inside Python, as one memory-mapped stream of tokens, prepared once."""

import itertools
import math
import os
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from slm.data.documents import Block
from slm.data.files import Entry, find_files
from slm.data.prepared import Facts, cache_folder, has_seen, known_facts, map_tokens, new_digest, place_of
from slm.data.text import Text, check_unchanged
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


def token_stream(text: Text, tokenizer: Tokenizer) -> tuple[Tensor, Facts]:
    """The documents of a text as tokens (N,), each document closed by the tokenizer's end of text.

    They are read once, into a file in the cache that is named by the places, sizes and times of the files and by the
    tokenizer; from then on that file is mapped into memory, which takes no time and no memory, whatever its size.

    Raises:
        InputError: no such file, nothing in it, one that is not what it says or changes while it is read.
        NotWrittenError: the prepared file cannot be written.
    """
    entries = text.entries()
    prepared = place_of(".tokens", READING, entries, text.text_field, text.errors, tokenizer.dump())
    facts = _once(lambda: known_facts(prepared, entries), lambda: _prepare(text, entries, tokenizer, prepared))
    return map_tokens(prepared, facts), facts


def saved_tokens(path: Path, setting: str = "data.path") -> tuple[Tensor, Facts]:
    """The tokens (N,), uint16, of a file that nanoGPT's scripts make, mapped as it is; it is read through once.

    Raises:
        InputError: no such file, an empty one, or one that is no whole number of tokens.
        NotWrittenError: what is known of it cannot be kept.
    """
    check(not path.is_dir(), f"{path} is a folder: a .bin of tokens is a file")
    [entry] = entries = find_files(path, setting=setting)
    check(entry.size > 0, f"{path} is empty: it must hold two bytes for each token")
    check(entry.size % 2 == 0, f"{path} has {entry.size} bytes, an odd number: tokens of two bytes were cut short")
    known = place_of(".facts", entries)
    facts = _once(lambda: known_facts(known, entries, has_tokens=False), lambda: _look_through(entry, known))
    return map_tokens(path, facts), facts


def own_bpe(text: Text, vocab_size: int, share: float = 1.0) -> SubwordTokenizer:
    """Byte-level BPE whose merges are learned from the first `share` of a text, counted in characters, once.

    Raises:
        InputError: see `token_stream` and `train_bpe`.
        NotWrittenError: the tokenizer cannot be kept.
    """
    entries = text.entries()
    kept = place_of(".json", READING, entries, text.text_field, text.errors, vocab_size, share, TRAINING_SIZE)
    return _once(lambda: _kept_bpe(kept, entries), lambda: _learn_bpe(text, entries, vocab_size, share, kept))


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


def _kept_bpe(kept: Path, entries: list[Entry]) -> SubwordTokenizer | None:
    if not (kept.is_file() and has_seen(kept.stat().st_mtime_ns, entries)):
        return None
    try:
        return read_tokenizer(kept)
    except InputError:
        say(f"{kept} is damaged: it is made again")
        return None


def _learn_bpe(text: Text, entries: list[Entry], vocab_size: int, share: float, kept: Path) -> SubwordTokenizer:
    begun = time.time_ns()
    size = sum(len(block.text) for block in text.blocks(entries, "measuring"))
    check(size > 0, f"{text} holds no text at all")
    pieces = _first(_pieces(text.blocks(entries, f"learning {vocab_size} ids")), int(share * size))
    sample = itertools.islice(pieces, 0, None, max(1, math.ceil(share * size / TRAINING_SIZE)))
    tokenizer = train_bpe(sample, vocab_size)
    replace_file(kept, tokenizer.dump().encode())
    os.utime(kept, ns=(begun, begun))
    return tokenizer


def _prepare(text: Text, entries: list[Entry], tokenizer: Tokenizer, prepared: Path) -> Facts:
    digest, num_tokens, num_documents, num_bytes, num_replaced = new_digest(), 0, 0, 0, 0
    is_exact = True

    def counted(blocks: Iterable[Block]) -> Iterator[Block]:
        nonlocal num_replaced
        for block in blocks:
            num_replaced += block.num_replaced
            yield block

    with replacing(prepared) as out:
        begun = os.fstat(out.fileno()).st_mtime_ns
        for pieces in _batches(_pieces(counted(text.blocks(entries, "preparing")))):
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


def _look_through(entry: Entry, known: Path) -> Facts:
    digest, largest, largest_at = new_digest(), -1, 0
    with replacing(known) as out:
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

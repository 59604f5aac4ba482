"""Text, on disk or inside Python, as one memory-mapped stream of tokens, prepared once."""

import math
import os
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor

from slm.documents import Block, Errors, read_documents
from slm.durable import alone_in, replace_file, replacing, sweep
from slm.errors import check
from slm.files import Entry, find_files, look_at
from slm.notices import say
from slm.prepared import Facts, is_newer, known_facts, map_tokens, new_digest, place_of
from slm.tokenizer import PIECE_SIZE, SubwordTokenizer, Tokenizer, cut, read_tokenizer, train_bpe

INSIDE_PYTHON = "the documentation inside Python"
BATCH_SIZE = 2**22
"""Characters, or tokens, that are in memory at once."""
TRAINING_SIZE = 16 * 10**6
"""Bytes of text, spread evenly over it, that the merges of BPE are learned from: all of a smaller text.

Learning takes up to 60 times as many bytes of memory, where no word comes twice.
"""


@dataclass(frozen=True)
class Text:
    """A text as it is asked for.

    Attributes:
        path: a file, a folder or a saved data set; None is the English documentation inside every Python.
        glob: which files of a folder (`slm.files`).
        text_field: the field of `.jsonl`, or column of a table, that holds the text.
        errors: what is done about bytes that are not UTF-8.
    """

    path: Path | None
    glob: str = "**/*"
    text_field: str = "text"
    errors: Errors = "strict"

    def entries(self) -> list[Entry]:
        """The files it is in."""
        if self.path is not None:
            return find_files(self.path, self.glob)
        content = "".join(text for _, text in sorted(topics.items())).encode()
        return [Entry(f"{INSIDE_PYTHON} {new_digest(content).hexdigest()}", len(content), 0)]

    def blocks(self, entries: list[Entry], title: str, limit: float = math.inf) -> Iterator[Block]:
        """The documents in these files, up to that many bytes of them; `position` counts over all. Shows a bar."""
        done, total = 0, sum(entry.size for entry in entries)
        inside = self.path is None
        interval = 0.2 if sys.stderr.isatty() else 30
        shown = {"unit": "B", "unit_scale": True, "leave": False, "delay": 1, "mininterval": interval}
        with Tqdm(desc=title, total=total, file=sys.stderr, **shown) as bar:
            for entry in entries:
                for block in _topics() if inside else read_documents(entry, self.text_field, self.errors):
                    position = done + block.position
                    if position > limit:
                        share = max(0.0, (limit - bar.n) / (position - bar.n))
                        yield Block(block.text[: int(share * len(block.text))], True, int(limit))
                        return
                    bar.update(position - bar.n)
                    yield block._replace(position=position)
                if not inside:
                    _check_unchanged(entry)
                done += entry.size

    def __str__(self) -> str:
        return INSIDE_PYTHON if self.path is None else f"data.path={self.path}"


def token_stream(text: Text, tokenizer: Tokenizer) -> tuple[Tensor, Facts]:
    """The documents of a text as tokens (N,), each document closed by the tokenizer's end of text.

    They are read once, into a file in the cache that is named by the places, sizes and times of the files and by the
    tokenizer; from then on that file is mapped into memory, which takes no time and no memory, whatever its size.

    Raises:
        InputError: no such file, nothing in it, one that is not what it says or changes while it is read.
        NotWrittenError: the prepared file cannot be written.
    """
    entries = text.entries()
    prepared = place_of(".tokens", entries, text.text_field, text.errors, tokenizer.dump())
    facts = known_facts(prepared, entries)
    if facts is None:
        with alone_in(prepared.parent):
            sweep(prepared.parent)
            facts = known_facts(prepared, entries) or _prepare(text, entries, tokenizer, prepared)
    return map_tokens(prepared, facts), facts


def saved_tokens(path: Path) -> tuple[Tensor, Facts]:
    """The tokens (N,), uint16, of a file that nanoGPT's scripts make, mapped as it is; it is read through once.

    Raises:
        InputError: no such file, an empty one, or one that is no whole number of tokens.
        NotWrittenError: what is known of it cannot be kept.
    """
    [entry] = entries = find_files(path)
    check(entry.size > 0, f"{path} is empty: it must hold two bytes for each token")
    check(entry.size % 2 == 0, f"{path} has {entry.size} bytes, an odd number: tokens of two bytes were cut short")
    known = place_of(".facts", entries)
    facts = known_facts(known, entries, has_tokens=False)
    if facts is None:
        with alone_in(known.parent):
            sweep(known.parent)
            facts = _look_through(entry, known)
    return map_tokens(path, facts), facts


def own_bpe(text: Text, vocab_size: int, share: float = 1.0) -> SubwordTokenizer:
    """Byte-level BPE whose merges are learned from the first `share` of a text, once.

    Raises:
        InputError: see `token_stream` and `train_bpe`.
        NotWrittenError: the tokenizer cannot be kept.
    """
    entries = text.entries()
    kept = place_of(".json", entries, text.text_field, text.errors, vocab_size, share)
    if not (kept.is_file() and is_newer(kept.stat().st_mtime_ns, entries)):
        with alone_in(kept.parent):
            sweep(kept.parent)
            size = sum(entry.size for entry in entries)
            blocks = text.blocks(entries, f"learning {vocab_size} ids", size * share)
            stride = math.ceil(size / TRAINING_SIZE)
            sample = (piece for number, (piece, _) in enumerate(_pieces(blocks)) if number % stride == 0)
            replace_file(kept, train_bpe(sample, vocab_size).dump().encode())
    return read_tokenizer(kept)


def _prepare(text: Text, entries: list[Entry], tokenizer: Tokenizer, prepared: Path) -> Facts:
    digest, num_tokens, num_documents, num_bytes, num_replaced = new_digest(), 0, 0, 0, 0

    def counted(blocks: Iterable[Block]) -> Iterator[Block]:
        nonlocal num_replaced
        for block in blocks:
            num_replaced += block.num_replaced
            yield block

    with replacing(prepared) as out:
        begun = os.fstat(out.fileno()).st_mtime_ns
        for pieces in _batches(_pieces(counted(text.blocks(entries, "preparing")))):
            if num_tokens == 0:
                _say_if_inexact(tokenizer, pieces[0][0])
            ids = tokenizer.encode(pieces)
            digest.update(ids)
            out.write(ids)
            num_tokens += len(ids) // array(tokenizer.typecode).itemsize
            num_documents += sum(is_last for _, is_last in pieces)
            num_bytes += sum(len(piece.encode()) for piece, _ in pieces)
        check(num_bytes > 0, f"{text} holds no text at all")
        facts = Facts(num_tokens, tokenizer.typecode, digest.hexdigest(), begun, num_documents, num_bytes, num_replaced)
        out.write(facts.footer())
    return facts


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
        _check_unchanged(entry)
        facts = Facts(len(stream), "H", digest.hexdigest(), begun, largest=largest, largest_at=largest_at)
        out.write(facts.footer())
    return facts


def _check_unchanged(entry: Entry) -> None:
    same = look_at(Path(entry.path)) == entry
    check(same, f"{entry.path} changed while it was read: start again when nothing writes to it")


def _topics() -> Iterator[Block]:
    position = 0
    for _, text in sorted(topics.items()):
        position += len(text.encode())
        yield Block(text, True, position)


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


def _say_if_inexact(tokenizer: Tokenizer, piece: str) -> None:
    ids = array(tokenizer.typecode, tokenizer.encode([(piece, False)]))
    if tokenizer.decode(ids) != piece:
        say(f"{tokenizer.name} does not give the text back as it was; bits per byte count the text as it is read")

"""A text as it is asked for: its files, and the documents in them, read while a bar shows how far."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from pydoc_data.topics import topics

from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from slm.data.documents import Block, Errors, read_documents
from slm.data.files import ANY, Entry, find_files, find_names, find_splits, look_at
from slm.data.splits import held_out_split, mere_names, named_splits
from slm.errors import check

INSIDE_PYTHON = "the documentation inside Python"


@dataclass(frozen=True)
class Text:
    """A text as it is asked for.

    Attributes:
        path: a file, a folder or a saved data set; None is the English documentation inside every Python.
        glob: which files of a folder (`slm.data.files`).
        text_field: the field of an object of JSON, or column of a table, that holds the text.
        errors: what is done about bytes that are not UTF-8.
        setting: what gave the path, for messages.
        split: which of the splits that the names in a folder tell (`slm.data.splits`); None for all that it holds.
    """

    path: Path | None
    glob: str = ANY
    text_field: str = "text"
    errors: Errors = "strict"
    setting: str = "data.path"
    split: str | None = None

    def splits(self) -> tuple["Text", "Text | None"]:
        """The text to train on, and the one to hold out where the folder has one; raises InputError as `entries`."""
        if self.path is None:
            return self, None
        train, held_out = find_splits(self.path)
        if train != self.path or not self.path.is_dir():
            return replace(self, path=train), None if held_out is None else replace(self, path=held_out)
        name = held_out_split(named_splits(find_names(self.path, self.glob)))
        return (replace(self, split="train"), replace(self, split=name)) if name else (self, None)

    def mere_names(self) -> tuple[str, str] | None:
        """Two of its files whose names look like splits, and are none (`slm.data.splits.mere_names`)."""
        return None if self.path is None else mere_names(find_names(self.path, self.glob))

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return INSIDE_PYTHON if self.path is None else f"{self.path}{f' (split {self.split})' if self.split else ''}"

    def entries(self) -> list[Entry]:
        """The files it is in."""
        if self.path is not None:
            return find_files(self.path, self.glob, self.setting, self.split)
        content = "".join(text for _, text in sorted(topics.items())).encode()
        return [Entry(f"{INSIDE_PYTHON} {blake2b(content).hexdigest()}", len(content), 0)]

    def blocks(self, entries: list[Entry], title: str) -> Iterator[Block]:
        """The documents in these files, while a bar shows how far they are read."""
        done, total = 0, sum(entry.size for entry in entries)
        inside = self.path is None
        interval = 0.2 if sys.stderr.isatty() else 10
        shown = {"unit": "B", "unit_scale": True, "leave": False, "delay": 1, "mininterval": interval}
        with Tqdm(desc=title, total=total, file=sys.stderr, **shown) as bar:
            for entry in entries:
                for block in _topics() if inside else read_documents(entry, self.text_field, self.errors):
                    bar.update(done + block.position - bar.n)
                    yield block
                if not inside:
                    check_unchanged(entry)
                done += entry.size

    def __str__(self) -> str:
        return self.place if self.path is None else f"{self.setting}={self.place}"


def check_unchanged(entry: Entry) -> None:
    """Raise InputError where a file is not as it was found."""
    same = look_at(Path(entry.path)) == entry
    check(same, f"{entry.path} changed while it was read: start again when nothing writes to it")


def _topics() -> Iterator[Block]:
    position = 0
    for _, text in sorted(topics.items()):
        position += len(text.encode())
        yield Block(text, True, position)

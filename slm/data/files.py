"""Which files make up a text, in which order, and which of them are held out."""

import contextlib
import errno
import functools
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal, NamedTuple

from slm.errors import InputError, check

ANY = "**/*"
INSIDE_PYTHON = "the documentation inside Python"
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words for each split in the names of files and folders, as the `datasets` library knows them."""
_SPLITS = {name: re.compile(rf"(?:^|[-._ 0-9])(?:{'|'.join(words)})(?:[-._ 0-9]|$)") for name, words in SPLITS.items()}
_METADATA = re.compile(
    r"(?:.*/)?(?:dataset_infos?\.json|dataset_dict\.json|dummy_data\.zip|config\.json|"
    r"(?i:(?:readme|licen[cs]e|copying|notice|changelog|citation)(?:\.(?:md|rst|txt|cff))?))",
    re.DOTALL,
)
"""Names of what lies beside the data in a repository."""
_ROWS = re.compile(r".*\.(?:parquet|(?:jsonl|ndjson)(?:\.gz)?)", re.IGNORECASE | re.DOTALL)
_JSON = re.compile(r".*\.json(?:\.gz)?", re.IGNORECASE | re.DOTALL)

Errors = Literal["strict", "replace"]


class Entry(NamedTuple):
    """A file, or the folder of a saved data set, as it was found."""

    path: str
    size: int
    """In bytes."""
    changed: int
    """When it was last changed, in nanoseconds."""


@dataclass(frozen=True)
class Text:
    """Files that were found, and how to read them.

    Attributes:
        place: where they are, in words.
        entries: the files, in order.
        setting: the setting that gave the path, for messages; empty for the documentation inside Python.
        text_field: the field of a JSON object, or the column of a table, that holds the text.
        errors: `strict` refuses what is not UTF-8, `replace` puts U+FFFD in its place.
        note: what should be said about the choice of files, if anything.
    """

    place: str
    entries: list[Entry]
    setting: str = "data.path"
    text_field: str = "text"
    errors: Errors = "strict"
    note: str = ""

    @property
    def is_tokens(self) -> bool:
        """Whether it is one file with the tokens of nanoGPT's scripts."""
        return self.entries[0].path == os.path.abspath(self.place) and self.place.lower().endswith(".bin")

    def __str__(self) -> str:
        return f"{self.setting}={self.place}" if self.setting else self.place


def find_texts(path: Path | None, glob: str = ANY, **reading: Any) -> tuple[Text, Text | None]:
    """The text to train on, and the text to hold out if the folder has one.

    A folder has one if it holds nanoGPT's `train.bin` and `val.bin`, if it is a saved `DatasetDict`, or if the name of
    every file tells which split it belongs to. `validation` is held out, or else `test`; neither is trained on.

    Args:
        path: a file, a folder, or a saved Hugging Face data set; None is the documentation inside Python.
        glob: which files of a folder, see `find_files`.
        reading: `text_field` and `errors` of the texts.

    Raises:
        InputError: see `find_files`.
    """
    if path is None:
        content = "".join(python_topics()).encode()
        entry = Entry(f"{INSIDE_PYTHON} {blake2b(content).hexdigest()}", len(content), 0)
        return Text(INSIDE_PYTHON, [entry], "", **reading), None
    for mark, train, others in (
        ("train.bin", "train.bin", ["val.bin"]),
        ("dataset_dict.json", "train", ["validation", "test"]),
    ):
        with _one_line(path):
            if (path / mark).is_file():
                name = next((name for name in others if (path / name).exists()), None)
                held_out = None if name is None else find_text(path / name, glob, **reading)
                return find_text(path / train, glob, **reading), held_out

    found = find_files(path, glob)
    is_folder = os.path.abspath(path) not in {entry.path for entry in found.values()}
    splits, note = splits_of(list(found)) if is_folder else ({}, "")
    held_out_split = next((split for split in ("validation", "test") if split in splits), None)
    if held_out_split is None:
        return Text(str(path), [found[name] for name in data_names(list(found))], note=note, **reading), None
    train_text, held_out_text = (
        Text(f"{path} (split {split})", [found[name] for name in splits[split]], **reading)
        for split in ("train", held_out_split)
    )
    return train_text, held_out_text


def python_topics() -> list[str]:
    """The documents of the documentation inside Python."""
    return [text for _, text in sorted(topics.items())]


def find_text(path: Path, glob: str = ANY, setting: str = "data.path", **reading: Any) -> Text:
    """All of the text at a path, whatever the names say; raises InputError as `find_files` does."""
    found = find_files(path, glob, setting)
    return Text(str(path), [found[name] for name in data_names(list(found))], setting, **reading)


def find_files(path: Path, glob: str = ANY, setting: str = "data.path") -> dict[str, Entry]:
    """The file at `path`, or the files of the folder there, by their names from there, sorted by code points.

    Links are followed, but no folder is entered twice. Names that begin with a dot are skipped.

    Args:
        path: a file, a folder, or a saved Hugging Face data set, which counts as one file.
        glob: which files of a folder: `*` and `?` stand for characters of a name, `**/` for any folders.
        setting: the setting that gave the path, for messages.

    Raises:
        InputError: nothing is there, no file matches, or it cannot be read.
    """
    with _one_line(path):
        path = Path(os.path.abspath(path))
        hint = "; --data.glob chooses among the files of a folder" if set("*?") & set(path.name) else ""
        check(path.exists(), f"{setting}={path}: there is no such file or folder{hint}")
        check(path.is_file() or path.is_dir(), f"{setting}={path} is neither a file nor a folder")
        if path.is_file() or ((path / "dataset_info.json").is_file() and (path / "state.json").is_file()):
            is_unused = glob != ANY and setting == "data.path"
            check(not is_unused, f"data.glob={glob} chooses among the files of a folder, and {setting}={path} is none")
            return {path.name: look_at(path)}
        found = dict(_walk(path))
    check(bool(found), f"{setting}={path}: the folder holds no files; give a text file or a folder of text files")
    matching = {name: found[name] for name in sorted(found) if matches(name, glob)}
    check(
        bool(matching),
        f"{setting}={path}: none of its {len(found)} files matches data.glob={glob}; **/ before a name looks into "
        f"folders, and {min(found)} is one of the files",
    )
    return matching


def look_at(path: Path) -> Entry:
    """A file, or all files of a data set's folder, as it is now; raises InputError if that cannot be seen."""
    with _one_line(path):
        statuses = [file.stat() for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
        size, changed = sum(status.st_size for status in statuses), max(status.st_mtime_ns for status in statuses)
        return Entry(str(path), size, changed)


def check_unchanged(entry: Entry) -> None:
    """Raise InputError if a file is no longer as it was found."""
    same = look_at(Path(entry.path)) == entry
    check(same, f"{entry.path} changed while it was read: start again when nothing writes to it")


def matches(name: str, glob: str) -> bool:
    """Whether a glob (see `find_files`) stands for a name with `/`."""
    return _pattern(glob).fullmatch(name) is not None


@functools.cache
def _pattern(glob: str) -> re.Pattern[str]:
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", glob)
    return re.compile("".join(meaning.get(part, re.escape(part)) for part in parts), re.DOTALL)


def _walk(top: Path) -> Iterator[tuple[str, Entry]]:
    """The files below a folder, each with its name from there."""

    def refuse(error: OSError) -> None:
        raise error

    seen = set()
    for folder, folders, files in os.walk(top, followlinks=True, onerror=refuse):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (os.path.join(folder, name) for name in files if not name.startswith(".")):
            try:
                status = os.stat(path)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ELOOP):  # a link that leads nowhere
                    continue
                raise
            if stat.S_ISREG(status.st_mode):
                yield Path(path).relative_to(top).as_posix(), Entry(path, status.st_size, status.st_mtime_ns)


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn an error of the system into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be read: {error.strerror}") from error


def data_names(names: Sequence[str]) -> list[str]:
    """The names without README, licence and the like if the others are shards of a data set, else all names."""
    others = [name for name in names if not _METADATA.fullmatch(name)]
    are_shards = any(map(_ROWS.fullmatch, others)) or (others and all(map(_JSON.fullmatch, others)))
    return others if are_shards else list(names)


def split_of(name: str) -> str | None:
    """The split that a name with `/` tells, by its folders or else by its last part; None if they tell two."""
    *folders, last = name.split("/")
    for words in (folders, [last]):
        told = [split for split, pattern in _SPLITS.items() if any(map(pattern.search, words))]
        if told:
            return told[0] if len(told) == 1 else None
    return None


def splits_of(names: Sequence[str]) -> tuple[dict[str, list[str]], str]:
    """The names of each split, README and the like aside; and a note if some names look like splits and are none.

    In a folder with code, `train.py` and `test_model.py` are files like the others.
    """
    splits: dict[str | None, list[str]] = {}
    for name in names:
        if not _METADATA.fullmatch(name):
            splits.setdefault(split_of(name), []).append(name)
    others = splits.pop(None, None)
    first = [splits[split][0] for split in SPLITS if split in splits]
    if others:
        note = f"{' and '.join(first[:2])} are files among others, not splits: --data.val_path names a text to hold out"
        return {}, note if "train" in splits and len(first) > 1 else ""
    if first and "train" not in splits:
        note = f"the names tell what to hold out ({', '.join(first)}), not what to train on: all of it is trained on"
        return {}, note
    return {split: found for split, found in splits.items() if split}, ""

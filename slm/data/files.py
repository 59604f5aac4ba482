"""Files on disk: which of them make up a text, and in which order."""

import contextlib
import errno
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from slm.data.splits import data_names, named_splits
from slm.errors import InputError, check

ANY = "**/*"


class Entry(NamedTuple):
    """A file, or the folder of a Hugging Face data set, as it was found."""

    path: str
    size: int
    """In bytes."""
    changed: int
    """When, in nanoseconds."""


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn what the system says into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be read: {error.strerror}") from error


def find_splits(path: Path) -> tuple[Path, Path | None]:
    """Where the texts for training and for validation are; the latter where a folder is of a kind that holds both.

    Those are the folder of nanoGPT's `train.bin` and `val.bin`, and a saved Hugging Face `DatasetDict`.
    """
    with _one_line(path):
        if (path / "train.bin").is_file():
            train, held_out = path / "train.bin", [path / "val.bin"]
        elif (path / "dataset_dict.json").is_file():
            train, held_out = path / "train", [path / "validation", path / "test"]
        else:
            return path, None
        return train, next((place for place in held_out if place.exists()), None)


def find_files(path: Path, glob: str = ANY, setting: str = "data.path", split: str | None = None) -> list[Entry]:
    """The file at `path`, or those in the folder there, in the order of their names (by code points, with `/`).

    Links are followed, but no folder is entered twice; what begins with a dot is hidden, and passed over. README,
    licence and the like are no text where they lie beside the shards of a data set.

    Args:
        path: a file, a folder, or a saved Hugging Face data set.
        glob: which files of a folder: `*` and `?` stand for characters of a name, `**/` for any folders.
        setting: what gave the path, for messages.
        split: which of the folder's splits (`slm.data.splits`); None for all that it holds.

    Raises:
        InputError: there is no such file or folder, none of its files matches, it cannot be looked into, or a name is
            not UTF-8.
    """
    found = _find(path, glob, setting)
    names = data_names(list(found)) if split is None else named_splits(list(found)).get(split, [])
    check(bool(names), f"{setting}={path} has no split {split} any more: start again when nothing writes to it")
    for name in names:
        _check_name(found[name].path, setting)
    return [found[name] for name in names]


def find_names(path: Path, glob: str = ANY) -> list[str]:
    """The names, from there, of all files in a folder that match; none where `path` is a file or a data set."""
    is_folder = path.is_dir() and not _is_data_set(path)
    return list(_find(path, glob, "data.path")) if is_folder else []


def _check_name(path: str, setting: str) -> None:
    """Refuse a name that the files of settings, which are UTF-8, could not hold."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{setting}: the name {os.fsencode(path)!r} is not UTF-8: rename it, or leave it out with --data.glob"
        ) from error


def _find(path: Path, glob: str, setting: str) -> dict[str, Entry]:
    """The files with their names from `path` on, in order."""
    with _one_line(path):
        path = Path(os.path.abspath(path))
        hint = "; --data.glob chooses among the files of a folder" if set("*?") & set(path.name) else ""
        check(path.exists(), f"{setting}={path}: there is no such file or folder{hint}")
        check(path.is_file() or path.is_dir(), f"{setting}={path} is neither a file nor a folder")
        is_alone = path.is_file() or _is_data_set(path)
        is_unused = is_alone and glob != ANY and setting == "data.path"
        check(not is_unused, f"data.glob={glob} chooses among the files of a folder, and {setting}={path} is none")
        if is_alone:
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
    """A file, or all the files of a data set's folder, as it is now; raises InputError where it cannot be looked at."""
    with _one_line(path):
        statuses = [file.stat() for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
        size, changed = sum(status.st_size for status in statuses), max(status.st_mtime_ns for status in statuses)
        return Entry(str(path), size, changed)


def _is_data_set(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() and (path / "state.json").is_file()


def _walk(top: Path) -> Iterator[tuple[str, Entry]]:
    """The files below a folder, each with its name from there."""
    folders, seen = [("", str(top))], set()
    while folders:
        prefix, folder = folders.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as listing:
            visible = sorted((entry for entry in listing if not entry.name.startswith(".")), key=lambda e: e.name)
        below = []
        for entry in visible:
            if entry.is_symlink() and _leads_nowhere(entry.path):
                continue
            if entry.is_dir():
                below.append((f"{prefix}{entry.name}/", entry.path))
            elif entry.is_file():
                status = entry.stat()
                yield prefix + entry.name, Entry(entry.path, status.st_size, status.st_mtime_ns)
        folders += reversed(below)


def _leads_nowhere(link: str) -> bool:
    try:
        os.stat(link)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        return True
    return False


def matches(name: str, glob: str) -> bool:
    """Whether a name with `/` is one that a glob (see `find_files`) stands for."""
    return _pattern(glob).fullmatch(name) is not None


@functools.cache
def _pattern(glob: str) -> re.Pattern[str]:
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", glob)
    return re.compile("".join(meaning.get(part, re.escape(part)) for part in parts), re.DOTALL)

"""What the names of the files in a folder tell: which are data, and which split of it each belongs to."""

import re
from collections.abc import Sequence

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Splits, and the words for them in the names of files and folders, as the `datasets` library knows them."""
_PATTERNS = {
    split: re.compile(rf"(?:^|[-._ 0-9])(?:{'|'.join(words)})(?:[-._ 0-9]|$)") for split, words in KEYWORDS.items()
}
_METADATA = re.compile(
    r"dataset_infos?\.json|dataset_dict\.json|dummy_data\.zip|"
    r"(?i:(?:readme|licen[cs]e|copying|notice|changelog|citation)(?:\.(?:md|rst|txt|cff))?)"
)
"""What lies beside the data in a repository, what `datasets` ignores among it, but for `_SETTINGS`."""
_SETTINGS = "config.json"
_ROWS = re.compile(r".*\.(?:parquet|(?:jsonl|ndjson)(?:\.gz)?)", re.IGNORECASE | re.DOTALL)
_JSON = re.compile(r".*\.json(?:\.gz)?", re.IGNORECASE | re.DOTALL)


def data_names(names: Sequence[str]) -> list[str]:
    """The names without README, licence and the like where the others are shards of a data set, else all of them."""
    others = _without_metadata(names)
    if any(map(_ROWS.fullmatch, others)):
        return others
    files = [name for name in names if not _METADATA.fullmatch(_own(name))]
    are_shards = bool(files) and all(map(_JSON.fullmatch, files))  # where all are .json, `_SETTINGS` may be data
    return files if are_shards else list(names)


def split_of(name: str) -> str | None:
    """The split that a name with `/` tells, by its folders or else by the file's own; None where they tell two."""
    *folders, own = name.split("/")
    for words in (folders, [own]):
        told = [split for split, pattern in _PATTERNS.items() if any(map(pattern.search, words))]
        if told:
            return told[0] if len(told) == 1 else None
    return None


def named_splits(names: Sequence[str]) -> dict[str, list[str]]:
    """The names of each split, where each file belongs to one and there is one to train on and one to hold out.

    Else there are none: in a folder with code, `train.py` and `test_model.py` are files like the others.
    """
    splits: dict[str, list[str]] = {}
    for name in _without_metadata(names):
        split = split_of(name)
        if split is None:
            return {}
        splits.setdefault(split, []).append(name)
    return splits if held_out_split(splits) else {}


def held_out_split(splits: dict[str, list[str]]) -> str | None:
    """Which split is held out: `validation`, or else `test`; None where there is nothing to train on, or neither."""
    return next((split for split in ("validation", "test") if {"train", split} <= splits.keys()), None)


def mere_names(names: Sequence[str]) -> tuple[str, str] | None:
    """Two names that look like a split to train on and one to hold out, where they are none."""
    told = {split_of(name): name for name in reversed(_without_metadata(names))}
    held_out = told.get("validation") or told.get("test")
    if named_splits(names) or "train" not in told or held_out is None:
        return None
    return told["train"], held_out


def _without_metadata(names: Sequence[str]) -> list[str]:
    return [name for name in names if not _METADATA.fullmatch(_own(name)) and _own(name) != _SETTINGS]


def _own(name: str) -> str:
    return name.rpartition("/")[2]

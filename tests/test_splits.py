"""A folder's names tell its splits as the `datasets` library reads them, and only where every file belongs to one."""

from pathlib import Path

import pytest

from slm.data.files import SPLITS, data_names, split_of, splits_of

LAYOUTS = [
    ["train/a.txt", "train/b.txt", "validation/a.txt"],
    ["train.txt", "validation.txt", "test.txt"],
    ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
    ["tiny_train.parquet", "tiny_validation.parquet"],
    ["my-training-set/part 1.txt", "my-training-set/deep/er/2.txt", "dev.2/x.txt", "eval/y.txt"],
    ["en/train/a.txt", "en/val/a.txt", "de/train/a.txt", "de/val/a.txt"],
    ["training2019.txt", "valid2020.txt"],
    ["train/my_test.txt", "validation/about_train.txt", "evaluation/x.txt"],
]


@pytest.mark.parametrize("names", LAYOUTS)
def test_splits_are_those_that_datasets_finds(names: list[str], tmp_path: Path) -> None:
    library = pytest.importorskip("datasets.data_files")
    for name in [*names, "README.md"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    patterns = library.get_data_patterns(str(tmp_path))
    expected = {
        str(split): sorted(
            {
                Path(found).relative_to(tmp_path).as_posix()
                for pattern in patterns[split]
                if any(tmp_path.glob(pattern))
                for found in library.resolve_pattern(pattern, str(tmp_path))
            }
        )
        for split in patterns
    }
    assert splits_of(sorted([*names, "README.md"])) == (expected, "")


def test_the_words_are_those_of_datasets() -> None:
    library = pytest.importorskip("datasets.data_files")
    assert {split: list(words) for split, words in SPLITS.items()} == {
        str(split): words for split, words in library.SPLIT_KEYWORDS.items()
    }
    assert data_names(["a.parquet", *library.FILES_TO_IGNORE]) == ["a.parquet"]


@pytest.mark.parametrize(
    "name", ["trainer.txt", "tests/a.txt", "contest.txt", "retrain.txt", "Train.txt", "train-test.txt", "devel/a.txt"]
)
def test_a_part_of_a_word_or_two_splits_at_once_tell_none(name: str) -> None:
    assert split_of(name) is None


@pytest.mark.parametrize(
    "names",
    [
        ["train.py", "test_model.py", "model.py"],
        ["test.txt", "novel.txt"],
        ["validation.txt", "test.txt"],
        ["train/a.txt", "validation/a.txt", "other/a.txt"],
    ],
)
def test_where_a_file_belongs_to_none_or_a_part_is_missing_there_are_no_splits(names: list[str]) -> None:
    assert splits_of(names)[0] == {}


@pytest.mark.parametrize(
    ("names", "left_out"),
    [
        (["README.md", "a.parquet"], {"README.md"}),
        (
            ["LICENSE", "README.md", "a.jsonl.gz", "deep/LICENCE.txt", "more.txt"],
            {"LICENSE", "README.md", "deep/LICENCE.txt"},
        ),
        (["README.md", "a.ndjson", "config.json"], {"README.md", "config.json"}),
        (["README.md", "a.json", "dataset_infos.json"], {"README.md", "dataset_infos.json"}),
        (["LICENSE", "README.md", "a.json", "config.json"], {"LICENSE", "README.md", "config.json"}),
        (["config.json", "deep/config.json"], set()),
        (["README.md", "config.json", "main.py"], set()),
        (["dataset_infos.json"], set()),
        (["README.md", "main.py", "package.json"], set()),
        (["LICENSE", "README.md", "chapter.md"], set()),
        (["README.md"], set()),
    ],
)
def test_what_lies_beside_shards_is_no_data(names: list[str], left_out: set[str]) -> None:
    assert data_names(names) == [name for name in names if name not in left_out]

"""Which files make up a text, and their order, do not depend on the machine; names tell splits as in `datasets`."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm.data import TextData, files
from slm.data.files import SPLITS, data_names, find_files, find_texts, matches, split_of, splits_of
from slm.errors import InputError


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def names_in(folder: Path, glob: str = "**/*") -> list[str]:
    return [Path(entry.path).relative_to(folder).as_posix() for entry in find_files(folder, glob).values()]


def test_a_folder_is_searched_in_the_order_of_names_without_what_is_hidden(tmp_path: Path) -> None:
    make(tmp_path, "b.txt", "a/z.txt", "a.txt", "B.txt", "é.txt", ".git/config", "a/.hidden")
    assert names_in(tmp_path) == ["B.txt", "a.txt", "a/z.txt", "b.txt", "é.txt"]


def test_each_entry_tells_size_and_time(tmp_path: Path) -> None:
    make(tmp_path, "a.txt")
    os.utime(tmp_path / "a.txt", ns=(5, 12_345))
    [entry] = find_files(tmp_path).values()
    assert entry == find_files(tmp_path / "a.txt")["a.txt"] == (str(tmp_path / "a.txt"), 5, 12_345)


@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("*.txt", ["a.txt"]),
        ("**/*.txt", ["a.txt", "sub/b.txt", "sub/deep/c.txt"]),
        ("sub/*", ["sub/b.txt", "sub/d.md"]),
        ("sub/**/*.txt", ["sub/b.txt", "sub/deep/c.txt"]),
        ("**", ["a.txt", "sub/b.txt", "sub/d.md", "sub/deep/c.txt"]),
        ("**/?.md", ["sub/d.md"]),
    ],
)
def test_a_glob_chooses_files(glob: str, found: list[str], tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "sub/b.txt", "sub/deep/c.txt", "sub/d.md")
    assert names_in(tmp_path, glob) == found


@given(st.text(st.characters(exclude_characters="*?/", exclude_categories=["Cs"]), min_size=1))
def test_any_name_is_matched_by_itself_by_a_star_and_in_any_folder(name: str) -> None:
    assert matches(name, name)
    assert matches(f"a/b/{name}", "**/*")
    assert matches(f"a/{name}", "a/*")
    assert not matches(f"a/{name}", "*")
    assert not matches(f"{name}x", name)


def test_a_glob_that_matches_nothing_is_refused_with_a_file_that_is_there(tmp_path: Path) -> None:
    make(tmp_path, "sub/a.md")
    with pytest.raises(
        InputError, match=r"none of its 1 files matches data.glob=\*.md; .* sub/a.md is one of the files"
    ):
        find_files(tmp_path, "*.md")


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    make(tmp_path, "text/a.txt", "elsewhere/b.txt")
    (tmp_path / "text/again").symlink_to(tmp_path / "text")
    (tmp_path / "text/c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "text")
    (tmp_path / "text/self").symlink_to(tmp_path / "text/self")
    (tmp_path / "text/nothing").symlink_to(tmp_path / "not there")
    assert names_in(tmp_path / "text") == ["a.txt", "c/b.txt"]


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    make(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "pipe")
    assert names_in(tmp_path) == ["a.txt"]


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing.txt: there is no such file or folder"):
        find_files(tmp_path / "nothing.txt")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the folder holds no files"):
        find_files(tmp_path)


def test_a_glob_that_would_choose_nothing_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "a.txt")
    with pytest.raises(InputError, match=r"data.glob=\*.zip chooses among the files of a folder, and .*a.txt is none"):
        find_files(tmp_path / "a.txt", "*.zip")
    assert find_files(tmp_path / "a.txt", "*.zip", "data.val_path")
    with pytest.raises(InputError, match=r"no such file or folder; --data.glob chooses among the files of a folder"):
        find_files(tmp_path / "*.txt")


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    for find in (find_files, find_texts):
        with pytest.raises(InputError, match=r"cannot be read: File name too long"):
            find(tmp_path / ("x" * 300))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_looked_into_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "secret/b.txt")
    (tmp_path / "secret").chmod(0)
    with pytest.raises(InputError, match="secret cannot be read: Permission denied"):
        find_files(tmp_path)


def test_what_is_no_file_and_no_folder_is_refused() -> None:
    with pytest.raises(InputError, match="/dev/null is neither a file nor a folder"):
        find_files(Path("/dev/null"))


def test_the_splits_of_folders_that_have_them(tmp_path: Path) -> None:
    make(tmp_path, "nano/train.bin", "nano/val.bin", "alone/train.bin", "plain/a.txt")
    make(tmp_path, *(f"dict/{name}" for name in ("dataset_dict.json", "train/x", "test/x", "validation/x")))
    make(tmp_path, *(f"tested/{name}" for name in ("dataset_dict.json", "train/x", "test/x")))
    for folder, train, held_out in [
        ("nano", "train.bin", "val.bin"),
        ("alone", "train.bin", None),
        ("dict", "train", "validation"),
        ("tested", "train", "test"),
    ]:
        found = [text and text.place for text in find_texts(tmp_path / folder)]
        assert found == [name and str(tmp_path / folder / name) for name in (train, held_out)]
    assert [text and text.place for text in find_texts(tmp_path / "plain")] == [str(tmp_path / "plain"), None]


def test_a_folder_with_nothing_to_train_on_by_its_names_is_taken_whole_and_that_is_said(tmp_path: Path) -> None:
    make(tmp_path, "test.txt", "validation.txt", "README.md")
    text, held_out = find_texts(tmp_path)
    assert (len(text.entries), held_out) == (3, None)
    assert text.note == (
        "the names tell what to hold out (validation.txt, test.txt), not what to train on: all of it is trained on"
    )
    assert find_texts(tmp_path / "test.txt")[0].note == ""


def test_a_folder_is_walked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "train.py", "test.py", "other.py")
    walks: list[Path] = []
    monkeypatch.setattr(files, "_walk", lambda top, walk=files._walk: (walks.append(top), walk(top))[1])
    data = TextData(256, 2, path=str(tmp_path))
    data.setup()
    assert len(list(data.at_a_glance(num_parameters=1))) == 2
    assert walks == [tmp_path]


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

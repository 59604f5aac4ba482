"""Text of any kind trains, is resumed and evaluated with the tokenizer it was trained with, or is refused."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import UNSHOWN, fit, small_model
from hypothesis import given
from hypothesis import strategies as st

from slm.data import TextData
from slm.data.token_data import TokenData
from slm.data.tokenizer import load_tokenizer, train_bpe
from slm.errors import InputError
from slm.run.checkpoint import read_checkpoint

Run = Callable[..., str]
RUN = Path("runs/version_0")
WORDS = "the cat sat on the mat and the dog ran after the cat to the mat. "
SMALL = ["--model.embed_dim=16", "--model.hidden_dim=32", "--model.num_layers=1", "--model.max_seq_len=16"]
QUIET = [*UNSHOWN, "--trainer.enable_progress_bar=false", "--trainer.max_epochs=1", "--data.batch_size=4"]
BPE = ["--data=TextData", "--data.tokenizer=bpe", "--model.vocab_size=270", "--data.path=mine.txt", *SMALL, *QUIET]


def text_data(**changes: Any) -> TextData:
    return TextData(**{"vocab_size": 256, "max_seq_len": 8, **changes})


def setup(**changes: Any) -> TextData:
    data = text_data(**changes)
    data.setup()
    return data


def saved(path: Path, ids: list[int]) -> Path:
    numpy.array(ids, dtype=numpy.uint16).tofile(path)
    return path


def streams(data: TextData) -> tuple[list[int], list[int]]:
    assert data.train_windows is not None
    assert data.val_windows is not None
    return data.train_windows.stream.long().tolist(), data.val_windows.stream.long().tolist()


def test_text_is_bytes_and_trains() -> None:
    data = setup()
    assert (data.tokenizer, data.optimum) == ("bytes", None)
    trainer = fit(small_model(vocab_size=256, max_seq_len=8), data, max_steps=2, limit_val_batches=1)
    assert trainer.global_step == 2


def test_text_with_another_vocabulary_than_bytes_is_refused_with_both_numbers() -> None:
    with pytest.raises(InputError, match=r"vocab_size=10000 .* 256 ids"):
        TextData(10_000, 128)


@given(st.integers(40, 400), st.integers(1, 12), st.floats(0.01, 0.99))
def test_every_token_but_the_first_is_a_target_once_or_left_over_before_the_held_out_part(
    num_tokens: int, max_seq_len: int, val_fraction: float
) -> None:
    class Counted(TokenData):
        def stream(self) -> torch.Tensor:
            return torch.arange(num_tokens)

        def digest(self, stream: torch.Tensor) -> bytes:
            return b""

    data = Counted(256, max_seq_len, val_fraction=val_fraction)
    data.setup()
    assert data.train_windows is not None
    assert data.val_windows is not None
    trained = [int(t) for k in range(len(data.train_windows)) for t in data.train_windows[k][1]]
    held_out = [int(t) for k in range(len(data.val_windows)) for t in data.val_windows[k][1]]
    assert trained == list(range(1, 1 + len(trained)))
    assert held_out == list(range(num_tokens - len(held_out), num_tokens))
    assert 0 <= held_out[0] - trained[-1] - 1 < max_seq_len
    assert abs(len(held_out) - val_fraction * num_tokens) <= 2 * max_seq_len


def test_the_held_out_text_may_be_given(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("training text")
    (tmp_path / "b.txt").write_text("held out text")
    data = setup(path=str(tmp_path / "a.txt"), val_path=str(tmp_path / "b.txt"))
    train, held_out = streams(data)
    assert bytes(train) == b"training text\xff"
    assert bytes(held_out) == b"held out text\xff"
    other = setup(path=str(tmp_path / "a.txt"), val_path=str(tmp_path / "a.txt"))
    tail = setup(path=str(tmp_path / "a.txt"), max_seq_len=4)
    assert len({data.fingerprint, other.fingerprint, tail.fingerprint}) == 3
    with pytest.raises(InputError, match=r"data.val_path=.*none.txt: there is no such file or folder"):
        setup(path=str(tmp_path / "a.txt"), val_path=str(tmp_path / "none.txt"))


def make(folder: Path, **files: str) -> str:
    """A folder with files of these contents, in whose names `__` stands for `/` and `_` before the end for a dot."""
    for name, text in files.items():
        path = folder / ".".join(name.replace("__", "/").rsplit("_", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(folder)


@pytest.mark.parametrize(
    ("files", "train", "held_out", "split"),
    [
        (
            {"train__b_txt": "two", "train__a_txt": "one", "validation__a_txt": "held"},
            "one|two|",
            "held|",
            "validation",
        ),
        ({"train_txt": "one", "validation_txt": "held", "test_txt": "never"}, "one|", "held|", "validation"),
        ({"train_txt": "one", "dev_txt": "held", "README_md": "about", "LICENSE_txt": "MIT"}, "one|", "held|", "dev"),
        ({"training__a_txt": "one", "eval__a_txt": "held"}, "one|", "held|", "eval"),
    ],
)
def test_a_folders_own_split_is_held_out_and_no_other_is_trained_on(
    files: dict[str, str], train: str, held_out: str, split: str, tmp_path: Path
) -> None:
    path = make(tmp_path, **files)
    data = setup(path=path, max_seq_len=2)
    assert tuple(bytes(part) for part in streams(data)) == (
        train.encode().replace(b"|", b"\xff"),
        held_out.encode().replace(b"|", b"\xff"),
    )
    name = {"dev": "validation", "eval": "test"}.get(split, split)
    line = next(data.at_a_glance(num_parameters=1))
    assert line.startswith(f"{path} (split train): ")
    assert line.endswith(f" held out of {path} (split {name})")


def test_a_folder_of_shards_from_the_hub_is_read_without_its_card(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "data").mkdir()
    for name, text in [("train-00000-of-00002", "one"), ("train-00001-of-00002", "two"), ("test-00000-of-00001", "no")]:
        parquet.write_table(arrow.table({"text": [text]}), tmp_path / f"data/{name}.parquet")
    for name in ("README.md", "LICENSE", ".gitattributes"):
        (tmp_path / name).write_text("no data")
    train, held_out = streams(setup(path=str(tmp_path), max_seq_len=2))
    assert (bytes(train), bytes(held_out)) == (b"one\xfftwo\xff", b"no\xff")
    (tmp_path / "data/test-00000-of-00001.parquet").unlink()
    assert setup(path=str(tmp_path), max_seq_len=2).facts.num_documents == 2


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (
            {"train_py": "a" * 9, "tests__test_model_py": "b" * 9, "model_py": "c" * 9},
            "train.py and tests/test_model.py",
        ),
        ({"test_txt": "a" * 9, "novel_txt": "b" * 9}, None),
        ({"README_md": "a" * 9, "chapter_md": "b" * 9}, None),
    ],
)
def test_names_among_others_are_those_of_files_and_that_is_said_once(
    files: dict[str, str], names: str | None, tmp_path: Path
) -> None:
    path = make(tmp_path, **files)
    data = setup(path=path)
    assert data.facts.num_documents == len(files)
    lines = [line for line in data.at_a_glance(num_parameters=1) if "--data.val_path" in line]
    told = f"{names} are files among others, not splits: --data.val_path names a text to hold out"
    assert lines == ([told] if names else [])
    held_out = make(tmp_path / "other", mine_txt="some text")
    assert not any("val_path" in line for line in setup(path=path, val_path=held_out).at_a_glance(num_parameters=1))


def test_a_folder_of_source_code_is_read_with_its_fixtures(tmp_path: Path) -> None:
    code, fixture = "print(1)\n", '[{"name": "a"}]'
    path = make(tmp_path, main_py=code, tests__names_json=fixture)
    data = setup(path=path, val_path=path, max_seq_len=2)
    assert bytes(streams(data)[0]) == code.encode() + b"\xff" + fixture.encode() + b"\xff"


def test_a_text_to_hold_out_that_is_given_wins_over_the_folders_own(tmp_path: Path) -> None:
    path = make(tmp_path / "text", train_txt="to train on", validation_txt="not this")
    data = setup(path=path, val_path=make(tmp_path / "other", mine_txt="to hold out"))
    assert [bytes(part) for part in streams(data)] == [b"to train on\xff", b"to hold out\xff"]


def test_a_share_to_hold_out_that_does_nothing_is_said(tmp_path: Path) -> None:
    path = make(tmp_path / "text", train_txt="to train on", validation_txt="not this")
    line = next(setup(path=path, max_seq_len=2, val_fraction=0.3).at_a_glance(num_parameters=1))
    assert line.endswith(f"held out of {path} (split validation), so that data.val_fraction=0.3 does nothing")
    assert "val_fraction" not in next(setup(path=path, max_seq_len=2).at_a_glance(num_parameters=1))


def test_a_glob_chooses_before_the_splits_are_told(tmp_path: Path) -> None:
    path = make(tmp_path, train_txt="to train on", validation_txt="to hold out", more_py="code", meta_csv="a,b")
    assert [bytes(part) for part in streams(setup(path=path, glob="*.txt"))] == [b"to train on\xff", b"to hold out\xff"]
    assert setup(path=path, glob="train*", max_seq_len=4).facts.num_bytes == len("to train on")


def test_the_merges_are_not_learned_from_the_split_that_is_held_out(tmp_path: Path) -> None:
    path = make(tmp_path, train_txt="abab " * 50, validation_txt="xyxy " * 50)
    data = setup(path=path, tokenizer="bpe", vocab_size=260)
    assert data.tokenizer is not None
    assert '"ab"' in data.tokenizer
    assert '"xy"' not in data.tokenizer


@pytest.mark.slow
def test_a_run_on_a_folder_with_a_split_says_what_it_holds_out_and_goes_on(slm: Run, workdir: Path) -> None:
    make(workdir / "texts", train_txt=WORDS * 9, validation_txt=WORDS * 3)
    flags = ["--data=TextData", "--data.path=texts", "--model.vocab_size=256", *SMALL, *QUIET]
    assert "texts (split train): 1 document, 585 bytes" in (output := slm(*flags))
    assert " held out of " in output
    assert "texts (split validation)" in output
    slm("--ckpt_path=last", "--trainer.max_epochs=2")
    (workdir / "texts/validation.txt").write_text(WORDS * 4)
    with pytest.raises(SystemExit):
        slm("--ckpt_path=last", "--trainer.max_epochs=3")


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="names there are Unicode")
def test_a_path_that_is_not_utf8_is_refused_and_read_in_a_folder(refused: Run, workdir: Path) -> None:
    (workdir / "texts").mkdir()
    name = os.fsdecode(b"texts/caf\xe9.txt")
    (workdir / name).write_text(WORDS)
    assert setup(path="texts").facts.num_bytes == len(WORDS)
    message = refused("--data=TextData", f"--data.path={name}", "--model.vocab_size=256", *SMALL, *QUIET)
    assert r"caf\xe9.txt' is not UTF-8: rename" in message


@pytest.mark.slow
def test_the_mark_before_utf8_is_no_part_of_settings_or_tokenizers(slm: Run, workdir: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (workdir / "mine.txt").write_bytes(mark + WORDS.encode() * 30)
    (workdir / "tokenizer.json").write_bytes(mark + train_bpe(iter([WORDS]), 270).dump().encode())
    (workdir / "mine.yaml").write_bytes(mark + b"data: {init_args: {tokenizer: tokenizer.json}}")
    output = slm(*BPE[:1], *BPE[2:], "--config=mine.yaml")
    assert "mine.txt: 1 document, 1,950 bytes" in output
    slm("--ckpt_path=last", "--trainer.max_epochs=2", "--data.tokenizer=tokenizer.json")


def test_a_saved_dict_of_data_sets_brings_its_own_validation(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {"train": "text to train", "test": "text to test", "validation": "to validate"}
    made = {name: datasets.Dataset.from_dict({"text": [text]}) for name, text in splits.items()}
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "saved"))
    train, held_out = streams(setup(path=str(tmp_path / "saved")))
    assert (bytes(train), bytes(held_out)) == (b"text to train\xff", b"to validate\xff")


def test_nanogpts_folder_is_used_as_it_is(tmp_path: Path) -> None:
    saved(tmp_path / "train.bin", list(range(50, 90)))
    saved(tmp_path / "val.bin", list(range(20)))
    data = setup(path=str(tmp_path), vocab_size=90)
    assert streams(data) == (list(range(50, 90)), list(range(20)))
    assert (data.tokenizer, data.token_bytes) == (None, None)
    [line] = data.at_a_glance(num_parameters=1)
    assert (
        line == f"{tmp_path}/train.bin: 40 tokens, 4 windows to train on in an epoch, 2 held out of {tmp_path}/val.bin"
    )
    (tmp_path / "val.bin").unlink()
    train, held_out = streams(setup(path=str(tmp_path), vocab_size=90))
    assert [*train, *held_out[1:]] == list(range(50, 90))


def test_saved_tokens_may_come_with_their_tokenizer(tmp_path: Path) -> None:
    bpe = train_bpe(iter([WORDS]), 270)
    (tmp_path / "tokenizer.json").write_text(bpe.dump())
    path = saved(tmp_path / "mine.bin", list(range(50)))
    data = setup(path=str(path), vocab_size=270, tokenizer=str(tmp_path / "tokenizer.json"))
    assert data.tokenizer == bpe.dump()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vocab_size": 89},
            r"train.bin: token 39 is 89, outside the vocabulary of vocab_size=89: use",
        ),
        ({"vocab_size": 90, "tokenizer": "bpe"}, r"data.tokenizer=bpe cannot learn from .*, which holds tokens"),
        ({"vocab_size": 90, "val_path": "README.md"}, r"val_path=README.md only one is a .bin of tokens"),
        ({"vocab_size": 90, "val_path": "none.bin"}, r"data.val_path=.*none.bin: there is no such file"),
        ({"vocab_size": 90, "max_seq_len": 20}, r"40 tokens are too few: .* max_seq_len=20 each, 41 tokens in all"),
    ],
)
def test_saved_tokens_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path / "train.bin", list(range(50, 90)))
    with pytest.raises(InputError, match=message):
        setup(path=str(tmp_path), **changes)


def test_a_held_out_text_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(WORDS)
    (tmp_path / "b.txt").write_text("short")
    with pytest.raises(InputError, match=r"6 tokens are too few for validation, which needs a window of max_seq_len=8"):
        setup(path=str(tmp_path / "a.txt"), val_path=str(tmp_path / "b.txt"))


def test_a_short_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(InputError, match="10 tokens are too few"):
        setup(path=str(tmp_path / "short.txt"))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    for tokenizer, vocab_size in (("bytes", 256), ("bpe", 300)):
        with pytest.raises(InputError, match=r"data.path=.*empty.txt holds no text at all"):
            setup(path=str(tmp_path / "empty.txt"), tokenizer=tokenizer, vocab_size=vocab_size)


def test_a_glance_tells_what_the_text_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "語" * 10}) for _ in range(4)))
    lines = list(setup(path=str(tmp_path / "a.jsonl")).at_a_glance(num_parameters=100))
    documents = "4 documents, 120 bytes, 124 tokens (0.97 bytes each)"
    assert lines == [f"{tmp_path}/a.jsonl: {documents}, 13 windows to train on in an epoch, 2 held out"]


def test_a_text_that_is_small_for_the_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 199)
    assert len(list(setup(path=str(tmp_path / "a.txt")).at_a_glance(num_parameters=184))) == 1
    [_, line] = setup(path=str(tmp_path / "a.txt")).at_a_glance(num_parameters=368)
    assert line.startswith("the text is small for the model: 0.50 training tokens per parameter")


def test_replaced_places_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"broken \xff text \xe9, but long enough")
    with pytest.raises(InputError, match=r"a.txt is not UTF-8 text: byte 0xff at offset 7"):
        setup(path=str(tmp_path / "a.txt"))
    path = str(tmp_path / "a.txt")
    assert list(setup(path=path, errors="replace", val_path=path).at_a_glance(1))[1].startswith("4 places in it")
    data = setup(path=path, errors="replace")
    assert list(data.at_a_glance(1))[1] == "2 places in it are not UTF-8: U+FFFD stands for each"


def test_of_a_tokenizer_that_loses_text_there_are_no_bits_per_byte(tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers")
    plain = library.Tokenizer(library.models.WordLevel({"the": 0, "[UNK]": 1, "[SEP]": 2}, unk_token="[UNK]"))
    plain.pre_tokenizer = library.pre_tokenizers.Whitespace()
    plain.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text(WORDS * 9)
    data = setup(path=str(tmp_path / "a.txt"), vocab_size=3, tokenizer=str(tmp_path / "tokenizer.json"))
    assert data.token_bytes is None
    assert "its tokens do not give all of it back as it was, so its bits per byte are not known" in data.at_a_glance(1)


def test_an_unknown_tokens_bytes_are_those_of_the_text_on_average(tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers")
    plain = library.Tokenizer.from_str(train_bpe(iter([WORDS]), 270).dump())
    plain.normalizer = library.normalizers.NFC()
    plain.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text(WORDS)
    data = setup(path=str(tmp_path / "a.txt"), vocab_size=270, tokenizer=str(tmp_path / "tokenizer.json"))
    assert data.token_bytes is not None
    assert data.token_bytes[data.facts.num_tokens % 270].item() == pytest.approx(len(WORDS) / data.facts.num_tokens)


def test_a_tokenizer_of_another_size_is_refused_with_both_numbers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(train_bpe(iter([WORDS]), 270).dump())
    with pytest.raises(InputError, match=r"it has 270 ids, vocab_size=300: use --model.vocab_size 270"):
        setup(vocab_size=300, tokenizer=str(tmp_path / "tokenizer.json"))


def test_bpe_learns_from_the_text_is_kept_and_goes_with_every_checkpoint(slm: Run, workdir: Path) -> None:
    (workdir / "mine.txt").write_text(WORDS * 30)
    output = slm(*BPE)
    assert "mine.txt: 1 document, 1,950 bytes, " in output
    learned = train_bpe(iter([(WORDS * 30)[: int(0.9 * 1950)]]), 270)
    for kept in (
        (RUN / "tokenizer.json").read_text(),
        *(
            torch.load(RUN / name, weights_only=True)["tokenizer"]
            for name in ("simple_language_model.pt", "checkpoints/best.ckpt", "checkpoints/last.ckpt")
        ),
    ):
        assert load_tokenizer(kept).dump() == learned.dump()
    assert "bits/byte" in output

    (workdir / "mine.txt").write_text("other words, that give other merges " * 50)
    assert "trainer.max_epochs is now 2" in slm(
        "--ckpt_path=last", "--trainer.max_epochs=2", "--allow_changed_data=true"
    )
    assert read_checkpoint(RUN / "checkpoints/last.ckpt")["tokenizer"] == learned.dump()
    shutil.copy(RUN / "checkpoints/last.ckpt", workdir / "alone.ckpt")
    assert "val/bits_per_byte" in slm("validate", "--ckpt_path=alone.ckpt")


@pytest.mark.slow
def test_a_tokenizer_file_may_be_gone_when_a_run_goes_on_and_another_is_refused(
    slm: Run, refused: Run, workdir: Path
) -> None:
    (workdir / "mine.txt").write_text(WORDS * 30)
    (workdir / "tokenizer.json").write_text(train_bpe(iter([WORDS]), 270).dump())
    slm(*BPE, "--data.tokenizer=tokenizer.json")
    (workdir / "tokenizer.json").write_text(train_bpe(iter(["another text"]), 260).dump())
    message = refused("--ckpt_path=last", "--trainer.max_epochs=2")
    assert "was trained with tokenizer=BPE of 270 ids, " in message
    assert "the data has tokenizer=BPE of 26" in message
    (workdir / "tokenizer.json").unlink()
    slm("--ckpt_path=last", "--trainer.max_epochs=2")
    message = refused("validate", "--ckpt_path=last", "--data.tokenizer=bytes")
    assert "vocab_size=270 does not fit text as bytes" in message
    message = refused("validate", "--ckpt_path=last", "--data.tokenizer=typo.json")
    assert "typo.json: there is no such file" in message


def test_fewer_merges_than_asked_for_is_told(slm: Run, workdir: Path) -> None:
    (workdir / "mine.txt").write_text("ab cd " * 100)
    output = slm(*BPE, "--trainer.fast_dev_run=true", "--model.max_seq_len=2")
    sizes = [int(word) for word in output.partition("has merges for only ")[2].split()[:1]]
    assert len(sizes) == 1
    assert 257 < sizes[0] < 270
    assert f"use --model.vocab_size {sizes[0]}" in output

"""Text goes into ids and comes back exactly, in any script; pieces have the tokens of the whole."""

import itertools
import json
from array import array
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from conftest import cutting_digits
from hypothesis import given
from hypothesis import strategies as st

from slm.data import tokenizer as module
from slm.data.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    SubwordTokenizer,
    Tokenizer,
    cut,
    load_tokenizer,
    read_tokenizer,
    train_bpe,
)
from slm.errors import InputError

tokenizers = pytest.importorskip("tokenizers")
TEXT = "".join(text for _, text in sorted(topics.items())[:20])
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
BPE = train_bpe(iter([TEXT]), 600)
DIGITS = SubwordTokenizer(cutting_digits(BPE.dump()))


def ids_of(tokenizer: Tokenizer, *pieces: tuple[str, bool]) -> list[int]:
    return array(tokenizer.typecode, tokenizer.encode(pieces)).tolist()


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE, DIGITS], ids=["bytes", "bpe", "digits"])
@given(text=ANY_TEXT)
def test_any_text_comes_back_exactly_and_its_bytes_are_counted(tokenizer: Tokenizer, text: str) -> None:
    ids = ids_of(tokenizer, (text, True))
    assert ids[-1] == tokenizer.end_of_text
    assert tokenizer.end_of_text not in ids[:-1]
    assert tokenizer.decode(ids) == text
    token_bytes = tokenizer.token_bytes()
    assert token_bytes is not None
    assert token_bytes[torch.tensor(ids)].sum() == len(text.encode())
    assert max(ids) < tokenizer.vocab_size == len(token_bytes)


@pytest.mark.parametrize("text", [END_OF_TEXT, f"a{END_OF_TEXT}b", "\r\n\0", "  leading", "\ufeff", "e\u0301"])
def test_text_that_looks_special_is_text(text: str) -> None:
    ids = ids_of(BPE, (text, False))
    assert BPE.end_of_text not in ids
    assert BPE.decode(ids) == text


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
def test_documents_are_closed_and_their_ends_are_no_text(tokenizer: Tokenizer) -> None:
    one, two = ids_of(tokenizer, ("one", False)), ids_of(tokenizer, ("two", False))
    end = tokenizer.end_of_text
    assert ids_of(tokenizer, ("one", True), ("two", True)) == [*one, end, *two, end]
    assert tokenizer.decode([*one, end, *two]) == "onetwo"


@given(
    st.lists(st.sampled_from([*"aé語 \n\r\t_1.,'", "  ", "\u2028", "\x1c", "don't", "\r\n\r\n"]), max_size=60).map(
        "".join
    )
)
def test_pieces_cut_at_whitespace_have_the_tokens_of_the_whole(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_SIZE", 7)
        pieces, start = [], 0
        while len(text) - start > 7:
            stop = cut(text, start)
            assert start < stop <= start + 7
            pieces.append(text[start:stop])
            start = stop
        pieces.append(text[start:])
    assert "".join(pieces) == text
    is_cut_in_a_word = any(a and b and not b[0].isspace() for a, b in itertools.pairwise(pieces))
    is_cut_in_whitespace = any(a and a[-1].isspace() for a in pieces[:-1])
    if not (is_cut_in_a_word or is_cut_in_whitespace):
        assert ids_of(BPE, *((piece, False) for piece in pieces)) == ids_of(BPE, (text, False))


def test_a_piece_is_cut_before_a_space_between_letters_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_SIZE", 10)
    assert cut("ab cd, ef ghijklmn", 0) == len("ab cd, ef")
    assert cut("ab cd, ef ghijklmn", 1) == len("ab cd, ef")
    assert cut("ab,\ncd,\nefghijklmnop", 0) == len("ab,\ncd,")
    assert cut("abcdefghijklmnop", 0) == 10


def test_the_merges_are_those_that_the_library_learns_and_the_same_each_time() -> None:
    plain = tokenizers.ByteLevelBPETokenizer()
    plain.train_from_iterator([TEXT], 600, min_frequency=0, show_progress=False, special_tokens=[END_OF_TEXT])
    merges = json.loads(BPE.dump())["model"]["merges"]
    assert [tuple(merge) for merge in merges] == [
        tuple(merge) for merge in json.loads(plain.to_str())["model"]["merges"]
    ]
    assert BPE.vocab_size == 600 == 256 + 1 + len(merges)
    assert train_bpe(iter([TEXT]), 600).dump() == BPE.dump()


def test_a_text_may_give_fewer_merges_than_asked_for() -> None:
    assert train_bpe(iter(["abab"]), 10_000).vocab_size == 256 + 1 + 2


def test_no_room_for_the_bytes_is_refused() -> None:
    assert train_bpe(iter([TEXT]), 257).vocab_size == 257
    with pytest.raises(InputError, match=r"vocab_size=256 is too small for byte-level BPE.*--model.vocab_size 10000"):
        train_bpe(iter([TEXT]), 256)


def test_what_is_dumped_loads_as_the_same(tmp_path: Path) -> None:
    assert isinstance(load_tokenizer(ByteTokenizer().dump()), ByteTokenizer)
    again = load_tokenizer(BPE.dump())
    assert (again.dump(), again.name, again.vocab_size) == (BPE.dump(), BPE.name, 600)
    (tmp_path / "tokenizer.json").write_text(BPE.dump(), encoding="utf-8")
    assert read_tokenizer(tmp_path / "tokenizer.json").dump() == BPE.dump()


def library_tokenizer(**changes: Any) -> Any:
    tokenizer = tokenizers.Tokenizer.from_str(BPE.dump())
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_truncation_padding_and_added_beginnings_of_a_file_are_left_out() -> None:
    plain = library_tokenizer()
    plain.add_special_tokens(["<s>"])
    plain.enable_truncation(3)
    plain.enable_padding(length=50)
    plain.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 600)])
    tokenizer = SubwordTokenizer(plain.to_str())
    assert ids_of(tokenizer, ("some words of text", False)) == ids_of(BPE, ("some words of text", False))
    assert tokenizer.vocab_size == 601


def test_a_tokenizer_that_changes_text_does_not_claim_to_know_its_bytes() -> None:
    assert (
        SubwordTokenizer(library_tokenizer(normalizer=tokenizers.normalizers.Lowercase()).to_str()).token_bytes()
        is None
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", r"tokenizer.json is no tokenizer.json of the tokenizers library: "),
        (b"\xff", r"data.tokenizer=.*tokenizer.json is not UTF-8 text"),
        (tokenizers.Tokenizer(tokenizers.models.BPE()).to_str().encode(), r"tokenizer.json has no tokens at all"),
        (
            BPE.dump().replace(END_OF_TEXT, "<other>").encode(),
            r"tokenizer.json has no token that ends a text: add",
        ),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_tokenizer(tmp_path / "tokenizer.json")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.tokenizer=.*none.json cannot be read: No such file.*give bytes, bpe"):
        read_tokenizer(tmp_path / "none.json")


def test_without_the_library_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(InputError, match=r'byte-level BPE needs the package tokenizers: pip install -e ".\[text\]"'):
        load_tokenizer(BPE.dump())

"""Text is shown as soon as it can be, whole characters only, and never what may become a stop text."""

import codecs
from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm.data.text_stream import TextStream
from slm.data.tokenizer import ByteTokenizer, SubwordTokenizer, Tokenizer, train_bpe

tokenizers = pytest.importorskip("tokenizers")
BPE = train_bpe(iter(["the cat sat on the mat, où la chatte était assise 你好 🙂"]), 300)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def metaspace() -> SubwordTokenizer:
    """One whose tokens look different at the beginning of a text."""
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE({"</s>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "▁b": 5}, [("▁", "a"), ("▁", "b")])
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    library.decoder = tokenizers.decoders.Metaspace()
    return SubwordTokenizer(library.to_str())


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return array(tokenizer.typecode, tokenizer.encode([(text, False)])).tolist()


def stream(
    tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str] = (), before: Sequence[int] = ()
) -> list[str]:
    text = TextStream(tokenizer, before, stops)
    pieces = []
    for token in ids:
        pieces.append(text.add(token))
        if text.is_over:
            return pieces
    return [*pieces, text.finish()]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
@given(text=ANY_TEXT)
def test_pieces_are_whole_characters_and_together_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert "".join(stream(tokenizer, ids_of(tokenizer, text))) == text


@given(content=st.binary(max_size=12))
def test_bytes_that_are_no_text_are_shown_as_python_shows_them_and_half_a_character_at_the_end_is_left_out(
    content: bytes,
) -> None:
    content = content.replace(b"\xff", b"")
    expected = codecs.getincrementaldecoder("utf-8")("replace").decode(content)
    assert "".join(stream(ByteTokenizer(), content)) == expected


def test_a_character_comes_with_its_last_byte() -> None:
    assert stream(ByteTokenizer(), "é🙂".encode()) == ["", "é", "", "", "", "🙂", ""]


def test_a_token_looks_as_it_does_after_those_before_it() -> None:
    tokenizer = metaspace()
    assert tokenizer.pieces is None
    assert stream(tokenizer, [5, 4], before=[4]) == [" b", " a", ""]
    assert stream(tokenizer, [5, 4], stops=[" a"], before=[4]) == [" b", ""]


def test_what_may_become_a_stop_text_waits() -> None:
    assert stream(ByteTokenizer(), b"a\n\nb", ["\n\n"]) == ["a", "", ""]
    assert stream(ByteTokenizer(), b"a\nb", ["\n\n"]) == ["a", "", "\nb", ""]
    assert stream(ByteTokenizer(), b"a\n", ["\n\n"]) == ["a", "", "\n"]


def test_an_end_of_text_ends_it_and_shows_what_waited() -> None:
    assert stream(ByteTokenizer(), b"a\n\xffb", ["\n\n"]) == ["a", "", "\n"]


@given(text=st.text("ab", max_size=12), stops=st.lists(st.text("ab", min_size=1, max_size=3), max_size=2))
def test_the_text_ends_before_the_first_stop(text: str, stops: list[str]) -> None:
    ends = [len(text[:end]) for end in range(len(text) + 1) if any(stop in text[:end] for stop in stops)]
    seen = text[: ends[0]] if ends else text
    cut = min((seen.index(stop) for stop in stops if stop in seen), default=len(seen))
    assert "".join(stream(ByteTokenizer(), text.encode(), stops)) == seen[:cut]


def test_an_end_at_the_last_token_shows_what_waited_once() -> None:
    text = TextStream(ByteTokenizer(), b"", ["abc"])
    assert "".join([*map(text.add, b"xab\xff"), text.finish()]) == "xab"


def test_a_character_that_began_in_what_came_before_is_none_of_its_own() -> None:
    assert TextStream(ByteTokenizer(), "é".encode()[:1]).add("é".encode()[1]) == "é"

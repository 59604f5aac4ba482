"""A text is read once, and mapped from then on; what is mapped is what was read."""

import os
from pathlib import Path

import pytest

from slm import corpus
from slm.corpus import byte_stream, cache_folder
from slm.errors import InputError, NotWrittenError

LONG_AGO = 1_000_000_000


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


def write(file: Path, text: str, seconds: int = LONG_AGO) -> str:
    file.write_text(text)
    os.utime(file, (seconds, seconds))
    return str(file)


def read(path: str) -> bytes:
    return bytes(byte_stream(path)[0].tolist())


def test_the_second_time_no_text_is_read(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "text.txt", "the text")
    first = byte_stream(path)
    [prepared] = cache.iterdir()
    monkeypatch.setattr(corpus, "_utf8_blocks", lambda file: pytest.fail("read again"))
    tokens, digest = byte_stream(path)
    assert (tokens.tolist(), digest) == (first[0].tolist(), first[1])
    assert read(path) == b"the text\xff"
    assert list(cache.iterdir()) == [prepared]


@pytest.mark.parametrize("seconds", [LONG_AGO, LONG_AGO + 1], ids=["another size", "another time"])
def test_a_changed_text_is_read_again(seconds: int, cache: Path, tmp_path: Path) -> None:
    before = byte_stream(write(tmp_path / "text.txt", "the text"))[1]
    path = write(tmp_path / "text.txt", "the next" if seconds > LONG_AGO else "the longer text", seconds)
    tokens, digest = byte_stream(path)
    assert bytes(tokens.tolist()) == (tmp_path / "text.txt").read_bytes() + b"\xff"
    assert digest != before


def test_a_text_that_changed_within_the_resolution_of_its_time_is_not_mistaken_for_the_one_before(
    cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the text")
    now = path.stat().st_mtime_ns
    assert read(str(path)) == b"the text\xff"
    path.write_text("the next")
    os.utime(path, ns=(now, now))
    assert read(str(path)) == b"the next\xff"


def test_the_digest_is_that_of_the_documents_wherever_they_are(cache: Path, tmp_path: Path) -> None:
    digests = []
    for name, texts in [("a", ["ab", "c"]), ("b", ["ab", "c"]), ("c", ["a", "bc"]), ("d", ["abc"])]:
        (tmp_path / name).mkdir()
        for number, text in enumerate(texts):
            write(tmp_path / name / f"{number}.txt", text)
        digests.append(byte_stream(str(tmp_path / name))[1])
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("block_size", [1, 2, 3, 1000])
def test_a_character_may_lie_across_blocks_and_a_bad_byte_is_found_where_it_is(
    block_size: int, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "BLOCK_SIZE", block_size)
    text = "naïve 語 🙂 end"
    assert read(write(tmp_path / "text.txt", text)) == text.encode() + b"\xff"
    for bad, offset in [(b"ok \xe8\xaa?", 3), (b"ok \xff", 3), ("語🙂".encode()[:-1], 3), ("🙂".encode() + b"\x80", 4)]:
        (tmp_path / "bad.txt").write_bytes(bad)
        with pytest.raises(
            InputError, match=rf"bad.txt is not UTF-8 text: byte 0x{bad[offset]:02x} at offset {offset};"
        ):
            byte_stream(str(tmp_path / "bad.txt"))
    assert len(list(cache.iterdir())) == 1


def test_a_text_that_changes_while_it_is_read_is_refused_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "log.txt", "some of it")
    blocks = corpus._utf8_blocks

    def grow(file: Path) -> object:
        yield from blocks(file)
        file.write_text("more of it now")

    monkeypatch.setattr(corpus, "_utf8_blocks", grow)
    with pytest.raises(InputError, match=r"log.txt changed while it was read"):
        byte_stream(path)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(cache: Path, tmp_path: Path) -> None:
    cache.parent.write_text("a file in the way")
    with pytest.raises(NotWrittenError, match=r"cache/slm/\w+\.bytes cannot be written"):
        byte_stream(write(tmp_path / "text.txt", "the text"))

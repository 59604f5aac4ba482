"""A text is read once, and mapped from then on; what is mapped is what was read, whatever stops or disturbs it."""

import gzip
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slm.data import corpus, documents, tokenizer
from slm.data.corpus import cache_folder, own_bpe, saved_tokens, token_stream
from slm.data.files import find_text, find_texts
from slm.data.tokenizer import ByteTokenizer, Tokenizer, train_bpe
from slm.errors import InputError, NotWrittenError

LONG_AGO = 1_000_000_000
SECONDS = itertools.count(LONG_AGO)
BYTES = ByteTokenizer()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


def write(file: Path, text: str | bytes, seconds: int = LONG_AGO) -> Path:
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    os.utime(file, (seconds, seconds))
    return file


def read(path: Path | None, tokenizer: Tokenizer = BYTES) -> list[int]:
    return token_stream(find_texts(path)[0], tokenizer)[0].long().tolist()


def kept_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != ".lock")


def test_documents_are_closed_by_an_id_that_utf8_never_contains_and_empty_ones_left_out(
    cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    for name, text in [
        ("a.txt", "naïve\r\n\0"),
        ("b.jsonl", '{"text": "語"}\n{"text": ""}\n{"text": "🙂"}'),
        ("c.txt", ""),
    ]:
        write(tmp_path / "texts" / name, text)
    write(tmp_path / "texts" / "d.txt.gz", gzip.compress(b"packed"))
    assert bytes(read(tmp_path / "texts")) == b"".join(
        t.encode() + b"\xff" for t in ["naïve\r\n\0", "語", "🙂", "packed"]
    )
    assert 0xFF not in "".join(map(chr, range(0x800))).encode()


def test_the_facts_count_documents_bytes_and_tokens(cache: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "語 one"}\n{"text": ""}\n{"text": "two"}')
    tokens, facts = token_stream(find_text(path), BYTES)
    assert (facts.num_documents, facts.num_bytes, facts.num_tokens) == (2, 7 + 3, 7 + 3 + 2) == (2, 10, len(tokens))


def test_the_second_time_no_text_is_read(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "text.txt", "the text")
    tokens, facts = token_stream(find_text(path), BYTES)
    kept = kept_in(cache)
    assert len(kept) == 1
    monkeypatch.setattr(documents, "read_documents", lambda *_: pytest.fail("read again"))
    again = token_stream(find_text(path), BYTES)
    assert (again[0].tolist(), again[1]) == (tokens.tolist(), facts)
    assert bytes(again[0].tolist()) == b"the text\xff"
    assert kept_in(cache) == kept


@pytest.mark.parametrize("seconds", [LONG_AGO, LONG_AGO + 1], ids=["another size", "another time"])
def test_a_changed_text_is_read_again(seconds: int, cache: Path, tmp_path: Path) -> None:
    before = token_stream(find_text(write(tmp_path / "text.txt", "the text")), BYTES)[1].digest
    text = "the next" if seconds > LONG_AGO else "the longer text"
    tokens, facts = token_stream(find_text(write(tmp_path / "text.txt", text, seconds)), BYTES)
    assert bytes(tokens.tolist()) == text.encode() + b"\xff"
    assert facts.digest != before


def test_a_text_that_changed_within_the_resolution_of_its_time_is_not_mistaken_for_the_one_before(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "SECONDS_OF_DOUBT", 1e9)  # any time is the same one to this file system
    path = tmp_path / "text.txt"
    path.write_text("the text")
    now = path.stat().st_mtime_ns
    assert bytes(read(path)) == b"the text\xff"
    path.write_text("the next")
    os.utime(path, ns=(now, now))
    assert bytes(read(path)) == b"the next\xff"


def test_a_time_of_another_clock_does_not_have_a_text_read_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "text.txt", "the text", seconds=2 * LONG_AGO + 2**31)
    read(path)
    monkeypatch.setattr(documents, "read_documents", lambda *_: pytest.fail("read again"))
    assert bytes(read(path)) == b"the text\xff"


def test_the_same_name_in_another_folder_is_another_text(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.txt", name)
        monkeypatch.chdir(tmp_path / name)
        assert bytes(read(Path("a.txt"))) == name.encode() + b"\xff"


def test_the_digest_is_that_of_the_documents_wherever_they_are(cache: Path, tmp_path: Path) -> None:
    digests = []
    for name, texts in [("a", ["ab", "c"]), ("b", ["ab", "c"]), ("c", ["a", "bc"]), ("d", ["abc"])]:
        (tmp_path / name).mkdir()
        for number, text in enumerate(texts):
            write(tmp_path / name / f"{number}.txt", text)
        digests.append(token_stream(find_text(tmp_path / name), BYTES)[1].digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_without_a_path_the_text_is_pythons_own_documentation(cache: Path) -> None:
    found = bytes(read(None)).split(b"\xff")
    assert found.pop() == b""
    assert found == [text.encode() for _, text in sorted(topics.items())]
    assert sum(map(len, found)) > 300_000


@pytest.mark.parametrize("name", ["bytes", "bpe"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_any_documents_come_back_through_pieces_and_batches_of_any_size(
    texts: list[str], name: str, cache: Path, tmp_path: Path
) -> None:
    chosen = BYTES if name == "bytes" else train_bpe(iter(texts), 260)
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    path = write(tmp_path / "a.jsonl", lines, seconds=next(SECONDS))
    with pytest.MonkeyPatch.context() as patch:
        for place, name, size in [(corpus, "BATCH_SIZE", 5), (corpus, "PIECE_SIZE", 3), (tokenizer, "PIECE_SIZE", 3)]:
            patch.setattr(place, name, size)
        if not any(texts):
            with pytest.raises(InputError, match="holds no text at all"):
                read(path, chosen)
            return
        ids = read(path, chosen)
    found: list[list[int]] = [[]]
    for token in ids:
        if token == chosen.end_of_text:
            found.append([])
        else:
            found[-1].append(token)
    assert found.pop() == []
    assert [chosen.decode(document) for document in found] == [text for text in texts if text]


@pytest.mark.slow
def test_a_large_vocabulary_takes_two_or_four_bytes_a_token(cache: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers")
    path = write(tmp_path / "a.txt", "hello")
    plain = library.Tokenizer.from_str(train_bpe(iter(["hello"]), 300).dump())
    assert token_stream(find_text(path), tokenizer.SubwordTokenizer(plain.to_str()))[0].dtype == torch.uint16
    plain.add_tokens([f"more {number}" for number in range(2**16)])
    large = tokenizer.SubwordTokenizer(plain.to_str())
    tokens, _ = token_stream(find_text(path), large)
    assert tokens.dtype == torch.uint32
    assert large.decode(tokens.tolist()) == "hello"


@pytest.mark.slow
def test_a_file_of_one_long_line_is_read(cache: Path, tmp_path: Path) -> None:
    words = [*"abcdefgh", "語", "🙂", " "]
    line = "".join(random.Random(0).choices(words, k=3_000_000))
    path = write(tmp_path / "line.txt", line)
    assert bytes(read(path)[:-1]).decode() == line


def test_many_small_files_are_read_in_their_order(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    for number in range(1000):
        (tmp_path / "many" / f"{number:04}.txt").write_text(str(number))
    assert bytes(read(tmp_path / "many")) == b"".join(f"{number}".encode() + b"\xff" for number in range(1000))


def test_the_merges_are_learned_from_the_training_text_alone_and_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "text.txt", "abab " * 900 + "xyxy " * 100)
    own = own_bpe(find_text(path), 300, share=0.9)
    assert '"ab"' in own.dump()
    assert '"xy"' not in own.dump()
    assert '"xy"' in own_bpe(find_text(path), 300).dump()
    monkeypatch.setattr(corpus, "train_bpe", lambda *_: pytest.fail("learned again"))
    assert own_bpe(find_text(path), 300, share=0.9).dump() == own.dump()


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.txt"])
def test_the_share_is_one_of_the_text_however_it_is_packed(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = random.Random(0).choices("abcdefgh", k=90_000)
    lines = ["".join(words[i : i + 90]) for i in range(0, len(words), 90)]
    content = "\n".join(json.dumps({"text": line}) for line in lines) if "json" in name else "".join(lines)
    path = write(tmp_path / name, gzip.compress(content.encode()) if name.endswith("gz") else content)
    seen: list[str] = []
    monkeypatch.setattr(corpus, "train_bpe", lambda texts, size: (seen.extend(texts), train_bpe(iter(seen), size))[1])
    own_bpe(find_text(path), 300, share=0.6)
    assert "".join(seen) == "".join(words[:54_000])


def test_a_damaged_tokenizer_in_the_cache_is_learned_again(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "text.txt", "abab " * 90)
    own = own_bpe(find_text(path), 300).dump()
    [kept] = cache.glob("*.json")
    kept.write_text(own[:100])
    assert own_bpe(find_text(path), 300).dump() == own == kept.read_text()
    assert capsys.readouterr().err == f"{kept} is damaged: it is made again\n" * 2


def test_the_merges_of_a_large_text_are_learned_from_parts_all_over_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "TRAINING_SIZE", 4000)
    for place in (corpus, tokenizer):
        monkeypatch.setattr(place, "PIECE_SIZE", 100)
    seen: list[str] = []
    monkeypatch.setattr(corpus, "train_bpe", lambda texts, size: (seen.extend(texts), train_bpe(iter(seen), size))[1])
    own_bpe(find_text(write(tmp_path / "text.txt", "abcd " * 4000)), 300)
    assert sum(map(len, seen)) == pytest.approx(4000, rel=0.1)


def test_a_tokenizer_that_loses_text_anywhere_is_known_for_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("tokenizers")
    plain = library.Tokenizer.from_str(train_bpe(iter(["hello"]), 300).dump())
    plain.normalizer = library.normalizers.Lowercase()
    changing = tokenizer.SubwordTokenizer(plain.to_str())
    assert token_stream(find_text(write(tmp_path / "a.txt", "lower " * 100)), changing)[1].is_exact
    monkeypatch.setattr(corpus, "BATCH_SIZE", 10)
    assert not token_stream(find_text(write(tmp_path / "b.txt", "lower " * 100 + "Upper")), changing)[1].is_exact
    assert token_stream(find_text(tmp_path / "b.txt"), train_bpe(iter(["lower"]), 300))[1].is_exact


def test_a_tokenizer_with_marks_for_spaces_is_exact_where_it_is(cache: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers")
    plain = library.Tokenizer(library.models.BPE(unk_token="<unk>"))
    plain.pre_tokenizer, plain.decoder = library.pre_tokenizers.Metaspace(), library.decoders.Metaspace()
    trainer = library.trainers.BpeTrainer(special_tokens=["<unk>", "</s>"], show_progress=False, vocab_size=100)
    plain.train_from_iterator(["one two three"], trainer)
    marked = tokenizer.SubwordTokenizer(plain.to_str())
    lines = '{"text": "one two"}\n{"text": "three one"}'
    assert token_stream(find_text(write(tmp_path / "a.jsonl", lines)), marked)[1].is_exact
    assert not token_stream(find_text(write(tmp_path / "b.jsonl", lines.replace("e o", "e x"))), marked)[1].is_exact


def test_saved_tokens_are_mapped_as_they_are_and_looked_through_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "BATCH_SIZE", 3)
    ids = [5, 60_000, 7, 8, 65_535, 9, 65_535]
    path = write(tmp_path / "train.bin", torch.tensor(ids, dtype=torch.uint16).numpy().tobytes())
    tokens, facts = saved_tokens(find_text(path))
    assert tokens.dtype == torch.uint16
    assert tokens.long().tolist() == ids
    assert (facts.num_tokens, facts.largest, facts.largest_at) == (7, 65_535, 4)
    assert sum(file.stat().st_size for file in cache.iterdir()) < 300
    monkeypatch.setattr(corpus, "_look_through", lambda *_: pytest.fail("looked through again"))
    assert saved_tokens(find_text(path))[1] == facts


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "train.bin is empty"), (b"abc", "train.bin has 3 bytes, an odd number")]
)
def test_a_broken_file_of_tokens_is_refused(content: bytes, message: str, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        saved_tokens(find_text(write(tmp_path / "train.bin", content)))


def test_a_text_that_changes_while_it_is_read_is_refused_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "log.txt", "some of it")

    read_documents = documents.read_documents

    def grow(*arguments: Any) -> Any:
        yield from read_documents(*arguments)
        path.write_text("more of it now")

    monkeypatch.setattr(documents, "read_documents", grow)
    with pytest.raises(InputError, match=r"log.txt changed while it was read"):
        read(path)
    assert kept_in(cache) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda content: content[:-1] + b"\x07", "is damaged, or of another version"),
        (lambda content: content[:-20], "is damaged, or of another version"),
        (lambda content: content[10:], "is damaged, or of another version"),
        (lambda content: b"", "is damaged, or of another version"),
        (lambda content: content.replace(b"typecode", b"typekode"), "is damaged, or of another version"),
        (lambda content: content.replace(b'{"num', b'["num'), "is damaged, or of another version"),
    ],
    ids=["version", "end", "beginning", "all", "facts", "JSON"],
)
def test_a_prepared_file_that_does_not_fit_is_named_and_made_again(
    change: Any, fault: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "text.txt", "the text of some length")
    before = read(path)
    [kept] = cache.glob("*.tokens")
    content = kept.read_bytes()
    kept.write_bytes(change(content))
    assert read(path) == before
    assert capsys.readouterr().err.splitlines()[0] == f"{kept} {fault}: it is made again"
    assert kept.read_bytes()[:24] == content[:24]


def test_a_cache_that_cannot_be_written_is_named(cache: Path, tmp_path: Path) -> None:
    cache.parent.write_text("a file in the way")
    with pytest.raises(NotWrittenError, match=r"cache/slm/.lock cannot be written"):
        read(write(tmp_path / "text.txt", "the text"))


def test_a_disk_without_room_is_one_line_and_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "text.txt", "the text " * 1000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(NotWrittenError, match=r"\.tokens cannot be written: File too large"):
            read(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert kept_in(cache) == []


PREPARE = """
import sys
import time
from pathlib import Path
from slm.data.corpus import token_stream
from slm.data.files import find_text
from slm.data.tokenizer import ByteTokenizer

class Slow(ByteTokenizer):
    def encode(self, pieces):
        print("begun", flush=True)
        while not Path(sys.argv[2]).exists():
            time.sleep(0.01)
        return super().encode(pieces)

print(token_stream(find_text(Path(sys.argv[1])), Slow())[1].digest)
"""


def start(path: Path, go_on: Path) -> subprocess.Popen[str]:
    """A process that prepares a text, and when it has begun waits for a file."""
    process = subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(path), str(go_on)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process


@pytest.mark.slow
def test_what_a_kill_leaves_is_no_prepared_file_and_is_removed_by_the_next(cache: Path, tmp_path: Path) -> None:
    path, other = write(tmp_path / "text.txt", "the text"), write(tmp_path / "other.txt", "another text")
    process = start(path, tmp_path / "never")
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [Path(name).suffix for name in kept_in(cache)] == [".unfinished"]
    read(other)
    assert [Path(name).suffix for name in kept_in(cache)] == [".tokens"]
    assert bytes(read(path)) == b"the text\xff"


@pytest.mark.slow
def test_of_two_processes_at_once_the_second_waits_and_reads_what_the_first_made(cache: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "text.txt", "the text")
    first = start(path, tmp_path / "go on")
    assert first.stdout is not None
    assert first.stdout.readline() == "begun\n"
    second = start(path, tmp_path / "go on")
    assert second.stderr is not None
    assert second.stderr.readline() == f"another process writes in {cache}: waiting for it\n"
    (tmp_path / "go on").touch()
    (one, _), (two, _) = first.communicate(), second.communicate()
    assert (first.returncode, second.returncode) == (0, 0)
    assert "begun" not in two
    assert one.splitlines()[-1] == two.strip()
    assert len(kept_in(cache)) == 1

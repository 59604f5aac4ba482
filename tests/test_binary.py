"""What is no text is refused by the name of what it is, wherever it lies; a few control characters are text."""

import bz2
import gzip
import io
import lzma
import pickle
import re
import sqlite3
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from slm.data import documents
from slm.data.documents import read_documents, read_text
from slm.data.files import look_at
from slm.errors import InputError

WORDS = "A text of some length, in which nothing is remarkable.\n" * 40
NOT_PACKED = numpy.random.default_rng(0).bytes(3000)


def archive(write: Callable[[io.BytesIO], None]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def tar(**how: int) -> bytes:
    def write(buffer: io.BytesIO) -> None:
        with tarfile.open(fileobj=buffer, mode="w", **how) as made:
            member = tarfile.TarInfo("a.txt")
            member.size = len(WORDS)
            made.addfile(member, io.BytesIO(WORDS.encode()))

    return archive(write)


def zipped(compression: int) -> bytes:
    def write(buffer: io.BytesIO) -> None:
        with zipfile.ZipFile(buffer, "w", compression) as made:
            made.writestr("a.txt", WORDS)

    return archive(write)


def picture(kind: str) -> bytes:
    return archive(lambda buffer: Image.new("RGB", (40, 40), "white").save(buffer, kind))


def database(folder: Path) -> bytes:
    with sqlite3.connect(folder / "made.db") as made:
        made.execute("create table texts (text)")
    made.close()
    return (folder / "made.db").read_bytes()


BINARY: dict[str, tuple[Callable[[], bytes], str]] = {
    "zip": (lambda: zipped(zipfile.ZIP_DEFLATED), "a zip archive"),
    "stored": (lambda: zipped(zipfile.ZIP_STORED), "a zip archive"),
    "pt": (lambda: archive(lambda buffer: torch.save({"a": torch.zeros(9)}, buffer)), "a zip archive"),
    "gz": (lambda: gzip.compress(WORDS.encode()), "packed with gzip"),
    "bz2": (lambda: bz2.compress(NOT_PACKED), ""),
    "xz": (lambda: lzma.compress(WORDS.encode()), "packed with xz"),
    "zst": (lambda: b"\x28\xb5\x2f\xfd" + NOT_PACKED, "packed with zstd"),
    "7z": (lambda: b"7z\xbc\xaf\x27\x1c" + NOT_PACKED, "a 7z archive"),
    "tar_ustar": (lambda: tar(format=tarfile.USTAR_FORMAT), "a tar archive"),
    "tar_gnu": (lambda: tar(format=tarfile.GNU_FORMAT), "a tar archive"),
    "tar_pax": (lambda: tar(format=tarfile.PAX_FORMAT), "a tar archive"),
    "npy": (lambda: archive(lambda buffer: numpy.save(buffer, numpy.zeros(9))), "a NumPy file"),
    "pickle": (lambda: pickle.dumps({"text": WORDS}), "a pickle"),
    "pdf": (lambda: b"%PDF-1.7\n" + WORDS.encode(), "a PDF"),
    "png": (lambda: picture("PNG"), "an image"),
    "jpg": (lambda: picture("JPEG"), "an image"),
    "gif": (lambda: picture("GIF"), ""),
    "tif": (lambda: picture("TIFF"), "an image"),
    "webp": (lambda: picture("WEBP"), ""),
    "zeros": (lambda: bytes(3000), "a binary file"),
    "noise": (lambda: NOT_PACKED, ""),
    "floats": (lambda: numpy.arange(3000, dtype=numpy.float32).tobytes(), "a binary file"),
    "utf16": (lambda: WORDS.encode("utf-16"), "UTF-16 text:"),
    "utf32": (lambda: WORDS.encode("utf-32"), "UTF-32 text:"),
    "utf32le": (lambda: WORDS.encode("utf-32-le"), "a binary file, or text in UTF-16 or UTF-32"),
}
"""Content and what it is called; it may be called anything where it is refused only for not being UTF-8."""


def refusal(path: Path, errors: str) -> str:
    with pytest.raises(InputError) as error_info:
        list(read_documents(look_at(path), "text", errors))  # type: ignore[arg-type]
    assert "\n" not in str(error_info.value)
    return str(error_info.value)


@pytest.mark.parametrize("errors", ["strict", "replace"])
@pytest.mark.parametrize("kind", BINARY)
def test_what_is_no_text_is_refused_by_what_it_is(kind: str, errors: str, tmp_path: Path) -> None:
    make, name = BINARY[kind]
    for file in ("a.txt", "a.jsonl", "a.json"):
        (tmp_path / file).write_bytes(make())
        assert re.search(rf"{file}( line \d+)? is {name}", refusal(tmp_path / file, errors))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(make()))
    message = refusal(tmp_path / "a.txt.gz", errors)
    assert f"a.txt.gz is {name.rstrip(':')}" in message
    assert not name or "it unpacks to: convert or unpack it to UTF-8 text, or leave it out with --data.glob" in message


@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_a_program_a_database_and_tables_are_refused(errors: str, tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table, path = arrow.table({"text": [WORDS]}), tmp_path / "a.txt"
    path.write_bytes(database(tmp_path))
    assert "a.txt is a binary file" in refusal(path, errors)
    parquet.write_table(table, path)
    assert "a.txt is a parquet file, whose name must end in .parquet" in refusal(path, errors)
    for writer in (arrow.ipc.new_file, arrow.ipc.new_stream):
        with writer(str(path), table.schema) as out:
            out.write_table(table)
        assert "a.txt is an arrow file" in refusal(path, errors)
    path.write_bytes(Path(sys.executable).read_bytes()[:5000])
    assert "a.txt is a binary file" in refusal(path, errors)


@pytest.mark.parametrize("errors", ["strict", "replace"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
    "text",
    [
        "Latin letters",
        "one\ntwo\n",
        "Широкая электрификация южных губерний",
        "την γλώσσα των ανθρώπων",
        "Ἐν ἀρχῇ ἦν ὁ λόγος",
        "tiếng Việt",
        "सभी मनुष्य",
        "электричка",
    ],
)
def test_utf16_without_its_mark_is_refused_in_any_alphabet(
    text: str, encoding: str, errors: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes((text * 100).encode(encoding))
    assert re.search("a.txt is (a binary file|not UTF-8 text|in another encoding)", refusal(path, errors))


@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_binary_content_far_into_a_file_is_refused(errors: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(WORDS.encode() * 1000 + bytes(3 * 2**20))
    assert "a.txt is a binary file" in refusal(tmp_path / "a.txt", errors)


@pytest.mark.parametrize(
    "text",
    [
        "a\0b\0c",
        "\0",
        WORDS + "\0" * 60,
        WORDS * 500 + "\0" * 60,
        "\x1b[31mred\x1b[0m\f\v\b\t" * 30,
        "GIF89a and PAR1, RIFF or WAVE and the ftyp box are names of formats; BZh9 and II* too",
        "a\nb\nc\nd\n" * 200,
        "1\t2\t3\n" * 200,
        "PK is not a zip archive",
        "the ftyp atom",
        "a" * documents.BLOCK_SIZE + "\0" * 9,
    ],
    ids=lambda text: repr(text[:20]),
)
def test_a_text_with_a_few_control_characters_is_read_as_it_is(text: str, tmp_path: Path) -> None:
    assert_read(text, tmp_path / "a.txt")


@pytest.mark.parametrize(
    "text",
    [
        "1\x01a\x012\x01b\n" * 100,
        "1\x01a\x012\x01b\x01" * 100,
        "k\x031\x02l\x032\x01m\x033\n" * 100,
        "a\x1fb\x1fc\x1e" * 50,
        "8=FIX.4.4\x019=65\x0135=A\x0149=SERVER\x0156=CLIENT\x0110=062\x01" * 30,
        "8=1\x019=2\x01" * 9000 + "\n",
        "0\n1\n" * 50 + "\0",
        "0\n1\n" * 50 + "0\0",
        "1\t2\t3\t4\0",
        "ID3\x02a\x01b\n",
        "Obj\x01Name\x01Size\n",
        "GIF89a\x01a picture\n",
    ],
    ids=lambda text: repr(text[:20]),
)
def test_a_text_whose_fields_control_characters_separate_is_read_as_it_is(text: str, tmp_path: Path) -> None:
    assert_read(text, tmp_path / "a.txt")


@pytest.mark.parametrize(
    "text",
    [
        "x" * 257 + "ustar format is what tar writes",
        "%PDF-1 begins every PDF file.",
        "BZh91AY&SY begins what bzip2 packs.",
        "GIF89a, GIF87a",
        "Rar! is how it begins",
        "SQLite format 3 is a format",
        "PAR1 begins and ends it",
        "II* and MM",
        "MM*",
        "RIFF1234WAVE",
        "ID3 tags, Obj, OggS, fLaC, GGUF, ARROW1, 7z, PK",
    ],
    ids=lambda text: repr(text[-30:]),
)
def test_prose_about_how_files_begin_is_read_as_it_is(text: str, tmp_path: Path) -> None:
    assert_read(text, tmp_path / "a.txt")


def assert_read(text: str, path: Path) -> None:
    path.write_bytes(text.encode())
    assert "".join(block.text for block in read_documents(look_at(path), "text", "strict")) == text
    assert read_text(path, "it") == text

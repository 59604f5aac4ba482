"""Every kind of file gives its documents, whole and in their order, or one line that names the place of a fault."""

import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm.data import documents
from slm.data.documents import binary_kind, read_documents
from slm.data.files import look_at
from slm.errors import InputError

TEXTS = [
    "2020-01-01",
    "naïve Ωμέγα",
    "語 🙂 👩‍👩‍👧 עברית हिन्दी",
    "CRLF\r\n and NUL \0 inside",
    "line\u2028separator\n\n",
    "\ufeffBOM \ufffd",
]


def read(path: Path, text_field: str = "text", errors: Any = "strict") -> list[str]:
    """The documents of a file."""
    found = [""]
    for block in read_documents(look_at(path), text_field, errors):
        found[-1] += block.text
        if block.is_last:
            found.append("")
    assert found.pop() == ""
    return found


def num_replaced(path: Path) -> int:
    return sum(block.num_replaced for block in read_documents(look_at(path), "text", "replace"))


def write(path: Path, content: bytes) -> Path:
    packed = gzip.compress(content) if path.suffix == ".gz" else content
    path.write_bytes(packed)
    return path


def write_table(path: Path, **columns: list[Any]) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), path)
    return path


@pytest.mark.parametrize("text", [*TEXTS[:-1], "in its middle \ufeff, a \ufffd", "{}", "[", " "])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "README", "a.json"])
def test_a_text_file_is_one_document_exactly_as_it_is(name: str, text: str, tmp_path: Path) -> None:
    assert read(write(tmp_path / name, text.encode())) == [text]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "A.JSONL", "a.ndjson", "a.ndjson.gz"])
@pytest.mark.parametrize("is_ascii", [True, False])
def test_each_line_of_jsonl_is_a_document(is_ascii: bool, name: str, tmp_path: Path) -> None:
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=is_ascii) for text in TEXTS]
    path = write(tmp_path / name, ("\n\n".join(lines) + "\r\n").encode())
    assert read(path) == TEXTS


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"a"),
        ("a.jsonl", b'{"text": "a"}'),
        ("a.ndjson", b'{"text": "a"}'),
        ("a.json", b'{"text": "a"}'),
        ("a.json", b'[{"text": "a"}]'),
    ],
)
def test_the_mark_before_utf8_is_no_content(name: str, content: bytes, suffix: str, tmp_path: Path) -> None:
    assert read(write(tmp_path / f"{name}{suffix}", MARK + content)) == ["a"]


def test_a_second_mark_and_one_within_a_field_are_content(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", MARK + MARK + b"a")) == ["\ufeffa"]
    assert read(write(tmp_path / "a.jsonl", b'{"text": "' + MARK + b'a"}')) == ["\ufeffa"]


def test_a_fault_after_the_mark_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    for name, content, offset in (("a.txt", b"ok \xff", 6), ("a.jsonl", b'{"\xff', 2)):
        with pytest.raises(InputError, match=rf"byte 0xff at offset {offset}"):
            read(write(tmp_path / name, MARK + content))


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.JSON"])
@pytest.mark.parametrize("block_size", [1, 7, 100, 2**20])
@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (",", ":")}])
def test_the_objects_of_an_array_are_documents(
    style: dict[str, Any], block_size: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "BLOCK_SIZE", block_size)
    rows = [{"id": number, "inner": {"text": ["no", {}]}, "text": text} for number, text in enumerate(TEXTS)]
    assert read(write(tmp_path / name, f"\n {json.dumps(rows, **style)}\r\n".encode())) == TEXTS


@pytest.mark.slow
def test_an_array_is_read_without_holding_it(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("w") as file:
        file.write("[")
        for number in range(20_000):
            file.write(("," if number else "") + json.dumps({"text": f"{number:06} " * 200}))
        file.write("]")
    size = path.stat().st_size
    tracemalloc.start()
    assert sum(1 for _ in read_documents(look_at(path), "text", "strict")) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 2


def test_the_first_object_of_a_json_may_be_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONGEST_FIRST", 2000)
    rows = [{"text": text, "after": ["é" * 70_000]} for text in TEXTS]
    assert read(write(tmp_path / "a.json", json.dumps(rows, ensure_ascii=False, indent=1).encode())) == TEXTS
    assert read(write(tmp_path / "a.json", "\n".join(map(json.dumps, rows)).encode())) == TEXTS


@pytest.mark.parametrize("name", ["c4.json.gz", "c4.json"])
def test_a_json_with_a_document_in_each_line_is_lines(name: str, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "url": "x"}) for text in TEXTS]
    assert read(write(tmp_path / name, "\n".join(lines).encode())) == TEXTS
    assert read(write(tmp_path / name, (" \n" * 300 + "\n".join(lines)).encode())) == TEXTS


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "a",\n "text": "b"}',
        '{"text": ["a"]}',
        "[1, 2]",
        "[]",
        '["a"]',
        "no JSON",
        '{"body": "a"}\n',
        '[{"name": "a"}]',
        '[\n  {\n    "name": "a",\n    "inner": {"text": "b"}\n  }\n]\n',
        '[{"name": "a"}, {"text": "b"}]',
        json.dumps([{"name": "a" * 9999}]),
        "[{name: 'a'}]",
        '[{"name": "a"',
        "[{}]",
    ],
    ids=lambda text: text[:40],
)
def test_any_other_json_is_text(text: str, tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.json", text.encode())) == [text]


def test_the_field_of_jsonl_is_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"body": "b", "text": "t"}\n{"body": "c"}')
    assert read(path, "body") == ["b", "c"]


def test_each_row_of_parquet_is_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "ROWS", 2)
    path = write_table(tmp_path / "a.parquet", text=TEXTS, id=list(range(len(TEXTS))))
    assert read(path) == TEXTS


def test_a_column_of_categories_is_text(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    path = write_table(tmp_path / "a.parquet", text=arrow.array(["b", "a", "b"]).dictionary_encode())
    assert read(path) == ["b", "a", "b"]


def test_each_row_of_a_saved_data_set_is_a_document(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"body": TEXTS[::-1]})
    data.select(range(len(TEXTS) - 1, -1, -1)).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved", "body") == TEXTS


@pytest.mark.parametrize("block_size", [1, 2, 3, 1000])
def test_a_character_may_lie_across_blocks(block_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BLOCK_SIZE", block_size)
    text = "".join(TEXTS)
    assert read(write(tmp_path / "marked.txt", b"\xef\xbb\xbf" + text.encode())) == [text]
    assert read(write(tmp_path / "a.txt", text.encode())) == [text]
    for bad, offset in [(b"ok \xe8\xaa?", 3), (b"ok \xff", 3), ("語🙂".encode()[:-1], 3), ("🙂".encode() + b"\x80", 4)]:
        path = write(tmp_path / "bad.txt", bad)
        with pytest.raises(
            InputError, match=rf"bad.txt is not UTF-8 text: byte 0x{bad[offset]:02x} at offset {offset};"
        ):
            read(path)


@given(st.binary(max_size=30).filter(lambda content: binary_kind(content, True) is None), st.integers(1, 7))
def test_replacing_gives_what_python_gives_and_counts_it(
    tmp_path_factory: Any, content: bytes, block_size: int
) -> None:
    path = write(tmp_path_factory.mktemp("text") / "a.txt", content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BLOCK_SIZE", block_size)
        patch.setattr(documents, "LARGEST_SHARE", 1)
        text = content.decode("utf-8-sig", errors="replace")
        assert read(path, errors="replace") == [text]
        genuine = content.decode(errors="ignore").count("\ufffd")
        assert num_replaced(path) == text.count("\ufffd") - genuine


CHINESE = "人人生而自由在尊严和权利上一律平等。他们赋有理性和良心并应以兄弟关系的精神相对待。" * 20
JAPANESE = "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。" * 20


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "shift_jis", "gb18030", "koi8-r"])
def test_replacing_does_not_turn_another_encoding_into_text(encoding: str, suffix: str, tmp_path: Path) -> None:
    texts = [JAPANESE] if encoding == "shift_jis" else [CHINESE, JAPANESE]
    for text in ["Широкая электрификация южных губерний. " * 20] if encoding == "koi8-r" else texts:
        path = write(tmp_path / f"a.txt{suffix}", text.encode(encoding))
        for errors in ("strict", "replace"):
            with pytest.raises(InputError, match=r"a.txt.* is (UTF-16|not UTF-8|in another encoding|a binary file)"):
                read(path, errors=errors)
    few = "naïve café, Übermut".encode("latin-1") * 50
    assert read(write(tmp_path / "b.txt", few + b"and other words" * 40), errors="replace")
    end = b"a" * documents.BLOCK_SIZE + b"\xff" * 9  # too short a block to judge by
    assert num_replaced(write(tmp_path / "c.txt", end)) == 9


def test_replacing_counts_in_lines_and_rows_too(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    lines = b'{"text": "a\xff\xffb \xef\xbf\xbd"}\n{"text": "\\ud800 c"}\n'
    path = write(tmp_path / "a.jsonl", lines)
    assert read(path, errors="replace") == ["a\ufffd\ufffdb \ufffd", "\ufffd c"]
    assert num_replaced(path) == 3
    array = write(tmp_path / "a.json", b"[" + lines.strip().replace(b"\n", b",\n") + b"]")
    assert read(array, errors="replace") == ["a\ufffd\ufffdb \ufffd", "\ufffd c"]
    assert num_replaced(array) == 3
    table = write_table(tmp_path / "a.parquet", text=arrow.array([b"x\xff"]).cast(arrow.string(), safe=False))
    assert (read(table, errors="replace"), num_replaced(table)) == (["x\ufffd"], 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.txt",
            "caf\u00e9".encode("latin-1"),
            r"a.txt is not UTF-8 text: byte 0xe9 at offset 3; .*--data.errors replace",
        ),
        ("a.txt.gz", b"ab\xff", r"a.txt.gz is not UTF-8 text: byte 0xff at offset 2 of what it unpacks to"),
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"a.png is an image: convert or unpack it"),
        ("a.txt", "words".encode("utf-16"), r"a.txt is UTF-16 text"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": 1\n', r"a.jsonl line 3 is not JSON: "),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": "a", "id": 1}',
            r"a.jsonl line 2 has no field text, it has body, id: name",
        ),
        ("a.jsonl", b'["a"]', r"a.jsonl line 1 is not an object with text in a field text"),
        ("a.jsonl", b'{"text": null}', r"a.jsonl line 1: its field text is not text but null"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\xff"}',
            r"a.jsonl line 2 is not UTF-8 text: byte 0xff at offset 10 of it;",
        ),
        ("a.jsonl", b'{"text": "\\udc00"}', r"a.jsonl line 1 holds half a surrogate pair at character 0"),
        ("a.jsonl", b"[" * 200_000, r"a.jsonl line 1 is not JSON: "),
        ("a.json", b'[{"text": "a"}, {"body": "b"}]', r"a.json element 2 has no field text, it has body: name one"),
        ("a.json", b'[{"text": null}, {"text": "b"}]', r"a.json element 1: its field text is not text but null"),
        ("a.json", b'[{"id": 1, "text": "a', r"a.json element 1 is not JSON: Unterminated string"),
        ("a.json", b'[{"text": "a"}, {"body": "b"}]', r"a.json element 2 has .* or leave the file out"),
        ("a.json", b'[{"text": "a"}, "b"]', r"a.json element 2 is not an object with text in a field text"),
        ("a.json", b'[{"text": "a"}, {"text": 1}]', r"a.json element 2: its field text is not text but 1"),
        ("a.json", b'[{"text": "a"}, {"text": "b]', r"a.json element 2 is not JSON: Unterminated string"),
        ("a.json", b'[{"text": "a"}, {"text" "b"}]' + b" " * 99, r"a.json element 2 is not JSON: Expecting ':'"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', r"a.json element 2: there is no comma or end of the array"),
        ("a.json", b'[{"text": "a"}', r"a.json element 2: there is no comma or end of the array before it"),
        ("a.json", b'[{"text": "a"},]', r"a.json element 2 is not JSON: Expecting value"),
        ("a.json", b'[{"text": "a"}] {}', r"a.json goes on after its array of 1 elements"),
        ("a.json", b'[{"text": "a\xff"}]', r"a.json is not UTF-8 text: byte 0xff at offset 12;"),
        ("a.json", b'[{"text": "\\udc00"}]', r"a.json element 1 holds half a surrogate pair at character 0"),
        ("a.json", b'[{"text": ' + b"[" * 200_000, r"a.json element 1 is not JSON: "),
        ("a.json", b'{"text": "a"}\n{"text": 1}', r"a.json line 2: its field text is not text but 1"),
        ("shard.BIN", b"\0\1", r"shard.BIN holds tokens by its name, not text: give it alone"),
        ("a.parquet", b"PAR1 and no more", r"a.parquet is not a whole parquet file: "),
    ],
)
def test_a_fault_is_refused_with_its_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as error_info:
        read(path)
    assert "\n" not in str(error_info.value)


@pytest.mark.parametrize("content", [b"not packed", gzip.compress(b"text" * 1000, mtime=0)[:-9], b""])
def test_a_broken_gzip_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(content)
    if not content:
        assert read(path) == [""]  # as gunzip has it
        return
    with pytest.raises(InputError, match=r"a.txt.gz is not a whole gzip file"):
        read(path)


def test_a_damaged_gzip_file_is_refused(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(os.urandom(1000).hex().encode()))
    content[200] ^= 0xFF
    (tmp_path / "a.txt.gz").write_bytes(content)
    with pytest.raises(InputError, match=r"a.txt.gz is not a whole gzip file"):
        read(tmp_path / "a.txt.gz")


def test_the_faults_of_a_table_are_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", text=["a", None], id=[1, 2])
    for text_field, message in [
        ("body", r"a.parquet has no column body, it has text, id: name one with --data.text_field"),
        ("id", r"a.parquet: its column id is not text but int64"),
        ("text", r"a.parquet row 2: its text is null"),
    ]:
        with pytest.raises(InputError, match=message):
            read(path, text_field)


def test_a_damaged_data_set_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="is not a data set that can be loaded") as error_info:
        read(tmp_path)
    assert "\n" not in str(error_info.value)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "secret.txt", b"secret")
    path.chmod(0)
    with pytest.raises(InputError, match=r"secret.txt cannot be read: Permission denied"):
        read(path)


def test_a_file_that_fails_while_it_is_read_is_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match="/proc/self/mem cannot be read"):
        read(Path("/proc/self/mem"))


def test_a_package_that_is_not_there_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table(tmp_path / "a.parquet", text=["a"])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r'a.parquet needs the package pyarrow: pip install -e ".\[text\]"'):
        read(path)

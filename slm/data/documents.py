"""A file -> its documents: the text in each kind of file that can hold some."""

import codecs
import contextlib
import gzip
import importlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from slm.data.binary import HEAD, binary_kind
from slm.data.files import Entry
from slm.errors import InputError, check

BLOCK_SIZE = 2**20
"""Bytes of a text that are read at once."""
ROWS = 1000
"""Rows of a table that are read at once."""
GENUINE = "\ufffd".encode()
"""The replacement character where a text has it of its own."""

MARK = "\ufeff"
"""What some programs put before UTF-8; it is no content."""
LONGEST_FIRST = 2**24
"""Bytes of the first line or object of a `.json` that are looked at to tell whether each holds a document."""
LONGEST_SYMBOL = 16
"""Characters: more than any of JSON's symbols has, but for text."""
JSON_GAP = re.compile(r"[ \t\r\n]*([\[,\]]?)[ \t\r\n]*")

Errors = Literal["strict", "replace"]
Readable = io.BufferedReader | gzip.GzipFile


class Block(NamedTuple):
    """A part of a document."""

    text: str
    is_last: bool
    """Whether the document ends with it."""
    position: int
    """Bytes of the file, as it lies on disk, that are read by now."""
    num_replaced: int = 0
    """Places that were no text and became U+FFFD."""


def read_documents(entry: Entry, text_field: str, errors: Errors) -> Iterator[Block]:
    """The documents of a file: those of each line, element or row where it has some, else the whole file.

    Lines are those of `.jsonl`, `.ndjson` and a `.json` with an object in its first line that has the field; elements
    are those of a `.json` that is an array whose first object has the field; rows are those of a table.

    Args:
        entry: names the file; `.gz` at the end of its name is unpacked.
        text_field: the field of an object, or column of a table, that holds the text.
        errors: `strict` refuses what is not UTF-8, `replace` puts U+FFFD in its place.

    Raises:
        InputError: names the file and the place in it where it is not what its name says.
    """
    path = Path(entry.path)
    name = path.name.lower()
    remedy = "give it alone, or leave it out with --data.glob"
    check(not name.endswith(".bin"), f"{path} holds tokens by its name, not text: {remedy}")
    with _one_line(str(path)):
        if path.is_dir():
            yield from _data_set(entry, text_field, errors)
            return
        shape = _shape(path, text_field)
        with path.open("rb") as raw:
            if name.endswith(".parquet"):
                yield from _parquet(entry, raw, text_field, errors)
                return
            file = _unpacked(path, raw)
            if shape == "lines":
                yield from _json_lines(path, file, raw, text_field, errors)
            elif shape == "array":
                yield from _json_array(path, _text(str(path), file, raw, errors), text_field, errors)
            else:
                yield from _text(str(path), file, raw, errors)


def read_text(path: Path, name: str) -> str:
    """A file as one text, as training would read it; raises InputError, which calls it by `name`, where it is none."""
    with _one_line(name), path.open("rb") as raw:
        remedy = "give a file of UTF-8 text"
        return "".join(block.text for block in _text(name, _unpacked(path, raw), raw, "strict", remedy))


@contextlib.contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turn what the system and the unpacker say of a file into an InputError."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{name} is not a whole gzip file: {error}; unpack it anew, or make it again") from error
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from error


def _unpacked(path: Path, raw: io.BufferedReader) -> Readable:
    return gzip.GzipFile(fileobj=raw) if path.name.lower().endswith(".gz") else raw


def _refuse_binary(block: bytes, name: str, is_start: bool, is_packed: bool, remedy: str = "") -> None:
    remedy = remedy or "convert or unpack it to UTF-8 text, or leave it out with --data.glob"
    kind = binary_kind(block, is_start)
    check(kind is None, f"{name} is {kind}{' in what it unpacks to' if is_packed else ''}: {remedy}")


def _text(name: str, file: Readable, raw: io.BufferedReader, errors: Errors, remedy: str = "") -> Iterator[Block]:
    """A file as one document, without the mark that some programs put before UTF-8."""
    decoder, offset, last, is_begun = codecs.getincrementaldecoder("utf-8")(errors), 0, b"", False
    while True:
        block = file.read(BLOCK_SIZE)
        begun = decoder.getstate()[0]  # the bytes of a character that the last block ended within
        _refuse_binary(block, name, offset == 0, file is not raw, remedy)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            kind = "a binary file" if b"\0" in block else "not UTF-8 text"
            raise InputError(
                f"{name} is {kind}: byte 0x{error.object[error.start]:02x} at "
                f"offset {offset - len(begun) + error.start}{' of what it unpacks to' if file is not raw else ''}; "
                + (remedy or "convert it to UTF-8, leave it out, or let --data.errors replace put U+FFFD there")
            ) from error
        num_replaced = text.count("\ufffd") - (last + block).count(GENUINE) if errors == "replace" else 0
        offset += len(block)
        position = raw.tell() if raw.seekable() else offset
        yield Block(text if is_begun else text.removeprefix(MARK), not block, position, num_replaced)
        if not block:
            return
        is_begun = is_begun or text != ""
        last = (last + block)[-2:]  # too short to hold a whole one


def _shape(path: Path, text_field: str) -> Literal["lines", "array", "text"]:
    """How the documents lie in a file; of a `.json`, its beginning tells."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        return "lines"
    if not name.endswith(".json"):
        return "text"
    with path.open("rb") as raw:
        file = _unpacked(path, raw)
        start = file.read(HEAD).removeprefix(MARK.encode()).lstrip()
        while not start and (more := file.read(HEAD)):
            start = more.lstrip()
        if opening := re.match(rb"\[\s*(?=\{)", start):
            return "array" if _begins_with_field(start[opening.end() :], file, text_field) else "text"
        if not start.startswith(b"{"):
            return "text"
        line = (start + file.readline(LONGEST_FIRST)).partition(b"\n")[0]
    try:
        fields = json.loads(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return "text"
    return "lines" if isinstance(fields.get(text_field), str) else "text"


def _begins_with_field(start: bytes, file: Readable, text_field: str) -> bool:
    """Whether an object has the field, or names it where no object can be read, so that a fault in it is refused."""
    while True:
        text = start.decode(errors="replace")
        try:
            return text_field in json.JSONDecoder().raw_decode(text)[0]
        except (ValueError, RecursionError):
            more = file.read(len(start)) if len(start) < LONGEST_FIRST else b""
        if not more:
            return json.dumps(text_field) in text or json.dumps(text_field, ensure_ascii=False) in text
        start += more


def _json_lines(path: Path, file: Readable, raw: io.BufferedReader, text_field: str, errors: Errors) -> Iterator[Block]:
    offset = 0
    _refuse_binary(file.peek(HEAD), str(path), True, file is not raw)
    for number, line in enumerate(file, start=1):
        if number == 1:
            unmarked = line.removeprefix(MARK.encode())
            offset, line = len(line) - len(unmarked), unmarked
        if line.strip():
            place = f"{path} line {number}"
            decoded, num_replaced = _decoded(line, place, errors, offset)
            try:
                fields = json.loads(decoded)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{place} is not JSON: {error}; every line must be an object with text") from error
            text, halves = _field(fields, place, text_field, errors)
            yield Block(text, True, raw.tell(), num_replaced + halves)
        offset += len(line)


def _json_array(path: Path, blocks: Iterator[Block], text_field: str, errors: Errors) -> Iterator[Block]:
    """The elements of an array, of which one at a time is in memory, and the block that it ends in."""
    decode, text, start, number, position, num_replaced = json.JSONDecoder().raw_decode, "", 0, 0, 0, 0

    def has_more() -> bool:
        """Read as much again as is left, so that a long element is not begun anew with every block."""
        nonlocal text, start, position, num_replaced
        parts = [text[start:]]
        missing = max(1, len(parts[0]))
        for block in blocks:
            parts.append(block.text)
            missing -= len(block.text)
            position, num_replaced = block.position, num_replaced + block.num_replaced
            if missing <= 0:
                break
        if len(parts) == 1:
            return False
        text, start = "".join(parts), 0
        return True

    while True:
        gap = JSON_GAP.match(text, start)
        assert gap is not None
        if gap.end() == len(text) and has_more():
            continue
        place = f"{path} element {number + 1}"
        if gap[1] == "]":
            check(gap.end() == len(text), f"{path} goes on after its array of {number} elements: leave that out")
            return
        check(gap[1] == ("," if number else "["), f"{place}: there is no comma or end of the array before it")
        try:
            fields, end = decode(text, gap.end())
        except (ValueError, RecursionError) as error:
            is_cut = isinstance(error, json.JSONDecodeError) and (
                "Unterminated" in error.msg or error.pos > len(text) - LONGEST_SYMBOL
            )
            if is_cut and has_more():
                continue
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise InputError(f"{place} is not JSON: {reason}; every element must be an object with text") from error
        start, number = end, number + 1
        whole, halves = _field(fields, place, text_field, errors)
        yield Block(whole, True, position, num_replaced + halves)
        num_replaced = 0


def _field(fields: Any, place: str, text_field: str, errors: Errors) -> tuple[str, int]:
    """The text in an object of JSON, and how many places in it were replaced."""
    known = sorted(fields) if isinstance(fields, dict) else []
    check(bool(known), f"{place} is not an object with text in a field {text_field}")
    remedy = f"it has {', '.join(known)}: name one with --data.text_field, or leave the file out with --data.glob"
    check(text_field in known, f"{place} has no field {text_field}, {remedy}")
    text = fields[text_field]
    if not isinstance(text, str):
        raise InputError(f"{place}: its field {text_field} is not text but {json.dumps(text)[:40]}")
    return _whole_characters(text, place, errors)


def _decoded(content: bytes, place: str, errors: Errors, offset: int = 0) -> tuple[str, int]:
    """Bytes as text, and how many places were replaced."""
    try:
        return content.decode(), 0
    except UnicodeDecodeError as error:
        check(
            errors == "replace",
            f"{place} is not UTF-8 text: byte 0x{content[error.start]:02x} at offset {offset + error.start}; convert "
            "it, or let --data.errors replace put U+FFFD there",
        )
        text = content.decode(errors="replace")
        return text, text.count("\ufffd") - content.count(GENUINE)


def _whole_characters(text: str, place: str, errors: Errors) -> tuple[str, int]:
    """Text without the halves of surrogate pairs, which JSON can hold and UTF-8 cannot; and how many there were."""
    try:
        text.encode()
        return text, 0
    except UnicodeEncodeError as error:
        check(
            errors == "replace",
            f"{place} holds half a surrogate pair at character {error.start}, which is no text: mend it, or let "
            "--data.errors replace put U+FFFD there",
        )
        whole = re.sub("[\ud800-\udfff]", "\ufffd", text)
        return whole, whole.count("\ufffd") - text.count("\ufffd")


def _parquet(entry: Entry, raw: io.BufferedReader, text_field: str, errors: Errors) -> Iterator[Block]:
    parquet, arrow = _extra("pyarrow.parquet", "parquet", entry.path), _extra("pyarrow", "parquet", entry.path)
    try:
        table = parquet.ParquetFile(raw)
        names = table.schema_arrow.names
        batches = table.iter_batches(batch_size=ROWS, columns=[text_field] if text_field in names else [])
        yield from _rows(entry, batches, names, table.metadata.num_rows, text_field, errors)
    except arrow.ArrowInvalid as error:
        raise InputError(f"{entry.path} is not a whole parquet file: {error}") from error


def _data_set(entry: Entry, text_field: str, errors: Errors) -> Iterator[Block]:
    datasets = _extra("datasets", "datasets", entry.path)
    try:
        data = datasets.load_from_disk(entry.path)
    except Exception as error:  # the library's own, of many kinds
        raise InputError(f"{entry.path} is not a data set that can be loaded: {error}") from error
    batches = data.with_format("arrow").iter(batch_size=ROWS)
    yield from _rows(entry, batches, data.column_names, len(data), text_field, errors)


def _rows(
    entry: Entry, batches: Iterator[Any], names: list[str], num_rows: int, text_field: str, errors: Errors
) -> Iterator[Block]:
    """The documents in batches of rows, which are pyarrow's tables."""
    arrow = _extra("pyarrow", "parquet", entry.path)
    check(
        text_field in names,
        f"{entry.path} has no column {text_field}, it has {', '.join(names)}: name one with --data.text_field",
    )
    row = 0
    for batch in batches:
        try:
            documents = batch[text_field].cast(arrow.large_binary()).to_pylist()
        except (arrow.ArrowNotImplementedError, arrow.ArrowInvalid) as error:
            kind = batch[text_field].type
            raise InputError(f"{entry.path}: its column {text_field} is not text but {kind}") from error
        for content in documents:
            row += 1
            check(
                content is not None, f"{entry.path} row {row}: its {text_field} is null, not text; leave such rows out"
            )
            text, num_replaced = _decoded(content, f"{entry.path} row {row}", errors)
            yield Block(text, True, entry.size * row // num_rows, num_replaced)


def _extra(module: str, extra: str, path: str) -> Any:
    """A package that only some inputs need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(f'{path} needs the package {package}: pip install -e ".[{extra}]"') from error

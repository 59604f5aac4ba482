"""A file -> its documents: the text in each kind of file that can hold some."""

import codecs
import gzip
import importlib
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from slm.errors import InputError, check
from slm.files import Entry

BLOCK_SIZE = 2**20
"""Bytes of a text that are read at once."""
ROWS = 1000
"""Rows of a table that are read at once."""
GENUINE = "\ufffd".encode()
"""The replacement character where a text has it of its own."""

Errors = Literal["strict", "replace"]


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
    """The documents of a file: those of each line of `.jsonl`, each row of a table, else the whole file.

    Args:
        entry: names the file; `.gz` at the end of its name is unpacked.
        text_field: the field of a line, or column of a table, that holds the text.
        errors: `strict` refuses what is not UTF-8, `replace` puts U+FFFD in its place.

    Raises:
        InputError: names the file and the place in it where it is not what its name says.
    """
    path = Path(entry.path)
    name = path.name.lower()
    remedy = "give it alone, or leave it out with --data.glob"
    check(not name.endswith(".bin"), f"{path} holds tokens by its name, not text: {remedy}")
    try:
        if path.is_dir():
            yield from _data_set(entry, text_field, errors)
            return
        with path.open("rb") as raw:
            if name.endswith(".parquet"):
                yield from _parquet(entry, raw, text_field, errors)
                return
            file = gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw
            if name.removesuffix(".gz").endswith(".jsonl"):
                yield from _json_lines(path, file, raw, text_field, errors)
            else:
                yield from _text(path, file, raw, errors)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is not a whole gzip file: {error}; unpack it anew, or make it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def _text(path: Path, file: IO[bytes] | gzip.GzipFile, raw: IO[bytes], errors: Errors) -> Iterator[Block]:
    decoder, offset, start, last = codecs.getincrementaldecoder("utf-8")(errors), 0, b"", b""
    while True:
        block = file.read(BLOCK_SIZE)
        begun = decoder.getstate()[0]  # the bytes of a character that the last block ended within
        start = start or block
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            kind = "a binary file" if b"\0" in block else "not UTF-8 text"
            kind = "UTF-16 text" if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else kind
            raise InputError(
                f"{path} is {kind}: byte 0x{error.object[error.start]:02x} at "
                f"offset {offset - len(begun) + error.start}{' of what it unpacks to' if file is not raw else ''}; "
                "convert it to UTF-8, leave it out, or let --data.errors replace put U+FFFD there"
            ) from error
        num_replaced = text.count("\ufffd") - (last + block).count(GENUINE) if errors == "replace" else 0
        yield Block(text, not block, raw.tell(), num_replaced)
        if not block:
            return
        last = (last + block)[-2:]  # too short to hold a whole one
        offset += len(block)


def _json_lines(
    path: Path, file: IO[bytes] | gzip.GzipFile, raw: IO[bytes], text_field: str, errors: Errors
) -> Iterator[Block]:
    offset = 0
    for number, line in enumerate(file, start=1):
        if line.strip():
            place = f"{path} line {number}"
            decoded, num_replaced = _decoded(line, place, errors, offset)
            try:
                fields = json.loads(decoded)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{place} is not JSON: {error}; every line must be an object with text") from error
            known = sorted(fields) if isinstance(fields, dict) else []
            check(bool(known), f"{place} is not an object with text in a field {text_field}")
            remedy = f"it has {', '.join(known)}: name one with --data.text_field"
            check(text_field in known, f"{place} has no field {text_field}, {remedy}")
            text = fields[text_field]
            if not isinstance(text, str):
                raise InputError(f"{place}: its field {text_field} is not text but {json.dumps(text)[:40]}")
            whole, halves = _whole_characters(text, place, errors)
            yield Block(whole, True, raw.tell(), num_replaced + halves)
        offset += len(line)


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


def _parquet(entry: Entry, raw: IO[bytes], text_field: str, errors: Errors) -> Iterator[Block]:
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

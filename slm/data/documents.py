"""A file -> its documents: the text in each kind of file that can hold some.

Plain text, gzip and JSON are read here. The `datasets` library reads the data sets that it saved, and brings `pyarrow`,
which reads parquet. JSON is not left to it, because it guesses types: it made a text `2020-01-01` a `2020-01-01
00:00:00`, and it held an array of 0.28 GB in 1.9 GB of memory.
"""

import codecs
import contextlib
import gzip
import importlib
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from slm.data.files import Entry, Errors, Text, check_unchanged, python_topics
from slm.errors import InputError, check

BLOCK_SIZE = 2**20
"""Bytes of a text that are read at once."""
ROWS = 1000
"""Rows of a table that are read at once."""
HEAD = 512
"""Bytes at the beginning of a file that tell its kind."""
LONGEST_FIRST = 2**20
"""Bytes at the beginning of a `.json` that tell whether it holds documents."""
FEW = 3
"""Control characters, or places that are not UTF-8, that even the shortest text may have."""
LARGEST_SHARE = 0.1
"""The largest share of such bytes in a text."""
LARGEST_NUL_SHARE = 0.04
"""The largest share of NULs. Text in UTF-16 has more, if spaces separate its words."""

MARK = "\ufeff"
"""What some programs put before UTF-8; it is no content."""
_REPLACEMENT = "\ufffd".encode()
_JSON_GAP = re.compile(r"[ \t\r\n]*([\[,\]]?)[ \t\r\n]*")
_CONTROLS = bytes(set(range(32)) - set(b"\b\t\n\v\f\r\x1b\x01\x02\x03\x1c\x1d\x1e\x1f"))
"""Control characters but for layout, colours, and the separators of fields in Hive, FIX and ASCII."""
_KINDS = {
    "UTF-32 text": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"),
    "UTF-16 text": (b"\xff\xfe", b"\xfe\xff"),
    "a zip archive, as docx, xlsx, epub and .pt are": (b"PK\x03\x04", b"PK\x05\x06"),
    "packed with gzip": (b"\x1f\x8b\x08",),
    "packed with xz": (b"\xfd7zXZ\0",),
    "packed with zstd": (b"\x28\xb5\x2f\xfd",),
    "a 7z archive": (b"7z\xbc\xaf\x27\x1c",),
    "a parquet file, whose name must end in .parquet": (b"PAR1\x15",),
    "an arrow file; of a saved data set give the folder": (b"ARROW1\0\0", b"\xff\xff\xff\xff"),
    "a pickle": (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
    "a NumPy file": (b"\x93NUMPY",),
    "a PDF": (b"%PDF-1.", b"%PDF-2."),
    "an old Office document": (b"\xd0\xcf\x11\xe0",),
    "an image": (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF89a\x01\0", b"II*\0", b"MM\0*"),
}
"""Kinds of files that are often taken for text, and how they begin."""

Readable = io.BufferedReader | gzip.GzipFile


class Block(NamedTuple):
    """A part of a document."""

    text: str
    is_last: bool
    """Whether the document ends with it."""
    position: int
    """Bytes of the file on disk that are read by now."""
    num_replaced: int = 0
    """Places that were no text and became U+FFFD."""


def read_blocks(text: Text, title: str) -> Iterator[Block]:
    """The documents of all files of a text, while a bar shows how far they are read; raises as `read_documents`."""
    done, total = 0, sum(entry.size for entry in text.entries)
    interval = 0.2 if sys.stderr.isatty() else 10
    shown = {"unit": "B", "unit_scale": True, "leave": False, "delay": 1, "mininterval": interval}
    from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm  # takes seconds, and few texts need it

    with Tqdm(desc=title, total=total, file=sys.stderr, **shown) as bar:
        for entry in text.entries:
            is_file = bool(text.setting)
            for block in read_documents(entry, text.text_field, text.errors) if is_file else _python_topics():
                bar.update(done + block.position - bar.n)
                yield block
            if is_file:
                check_unchanged(entry)
            done += entry.size


def _python_topics() -> Iterator[Block]:
    position = 0
    for text in python_topics():
        position += len(text.encode())
        yield Block(text, True, position)


def read_documents(entry: Entry, text_field: str, errors: Errors) -> Iterator[Block]:
    """The documents of a file: its lines, elements or rows if it has some, else the whole file.

    Lines count in `.jsonl`, in `.ndjson`, and in a `.json` whose first line is an object with the field. Elements count
    in a `.json` that is an array whose first object has the field. Rows are those of a table.

    Args:
        entry: names the file; it is unpacked if its name ends in `.gz`.
        text_field: the field of an object, or column of a table, that holds the text.
        errors: `strict` refuses what is not UTF-8, `replace` puts U+FFFD in its place.

    Raises:
        InputError: the file is not what its name says; the message names the place in it.
    """
    path = Path(entry.path)
    name = path.name.lower()
    remedy = "give it alone, or leave it out with --data.glob"
    check(not name.endswith(".bin"), f"{path} holds tokens by its name, not text: {remedy}")
    with _one_line(str(path)):
        if path.is_dir() or name.endswith(".parquet"):
            yield from _rows(entry, text_field, errors)
            return
        shape = _shape(path, text_field)
        with path.open("rb") as raw:
            file = _unpacked(path, raw)
            if shape == "lines":
                yield from _json_lines(path, file, raw, text_field, errors)
            elif shape == "array":
                yield from _json_array(path, _text(str(path), file, raw, errors), text_field, errors)
            else:
                yield from _text(str(path), file, raw, errors)


def read_text(path: Path, name: str) -> str:
    """A file as one text, as training would read it; raises InputError, which calls it by `name`, if it is none."""
    with _one_line(name), path.open("rb") as raw:
        remedy = "give a file of UTF-8 text"
        return "".join(block.text for block in _text(name, _unpacked(path, raw), raw, "strict", remedy))


@contextlib.contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turn an error of the system or of gzip into an InputError."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{name} is not a whole gzip file: {error}; unpack it anew, or make it again") from error
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from error


def _unpacked(path: Path, raw: io.BufferedReader) -> Readable:
    return gzip.GzipFile(fileobj=raw) if path.name.lower().endswith(".gz") else raw


def binary_kind(block: bytes, is_start: bool) -> str | None:
    """What a block of a file is if it cannot be UTF-8 text; None if it may be.

    Args:
        block: some of its bytes.
        is_start: whether the file begins with them; else a short block, which has few to judge by, may be anything.
    """
    if is_start:
        for kind, beginnings in _KINDS.items():
            if block.startswith(beginnings):
                return kind
        if block[257:].startswith((b"ustar\0", b"ustar  \0")):
            return "a tar archive"
    parts = [block[:HEAD], block] if is_start else [block] if len(block) >= HEAD else []
    for part in parts:
        num_controls = len(part) - len(part.translate(None, _CONTROLS))
        nul_limit, limit = (max(FEW, share * len(part)) for share in (LARGEST_NUL_SHARE, LARGEST_SHARE))
        if part.count(0) > nul_limit or num_controls > limit:
            return "a binary file, or text in UTF-16 or UTF-32"
    return None


def _refuse_binary(kind: str | None, name: str, is_packed: bool, remedy: str = "") -> None:
    remedy = remedy or "convert or unpack it to UTF-8 text, or leave it out with --data.glob"
    check(kind is None, f"{name} is {kind}{' in what it unpacks to' if is_packed else ''}: {remedy}")


def _text(name: str, file: Readable, raw: io.BufferedReader, errors: Errors, remedy: str = "") -> Iterator[Block]:
    """A file as one document, without the mark that some programs put before UTF-8."""
    decoder, is_packed = codecs.getincrementaldecoder("utf-8")(errors), file is not raw
    offset, last, is_begun = 0, b"", False
    while True:
        block = file.read(BLOCK_SIZE)
        begun = decoder.getstate()[0]  # the bytes of a character that the last block ended within
        _refuse_binary(binary_kind(block, offset == 0), name, is_packed, remedy)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name} is {'a binary file' if 0 in block else 'not UTF-8 text'}: byte "
                f"0x{error.object[error.start]:02x} at offset {offset - len(begun) + error.start}"
                f"{' of what it unpacks to' if is_packed else ''}; "
                + (remedy or "convert it to UTF-8, leave it out, or let --data.errors replace put U+FFFD there")
            ) from error
        num_replaced = text.count("\ufffd") - (last + block).count(_REPLACEMENT) if errors == "replace" else 0
        is_other = num_replaced > max(FEW, LARGEST_SHARE * len(block)) and (offset == 0 or len(block) >= HEAD)
        _refuse_binary("in another encoding than UTF-8, or a binary file" if is_other else None, name, is_packed)
        offset += len(block)
        position = raw.tell() if raw.seekable() else offset
        yield Block(text if is_begun else text.removeprefix(MARK), not block, position, num_replaced)
        if not block:
            return
        is_begun = is_begun or text != ""
        last = (last + block)[-2:]  # too short to hold a whole one


def _shape(path: Path, text_field: str) -> Literal["lines", "array", "text"]:
    """How the documents lie in a file; the beginning of a `.json` tells."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        return "lines"
    if not name.endswith(".json"):
        return "text"
    with path.open("rb") as raw:
        start = _unpacked(path, raw).read(LONGEST_FIRST).decode("utf-8-sig", errors="replace").lstrip()
    opening = re.match(r"\[\s*(?=\{)", start)
    try:
        if opening:
            return "array" if text_field in json.JSONDecoder().raw_decode(start, opening.end())[0] else "text"
        fields = json.loads(start.partition("\n")[0])
    except (ValueError, RecursionError):  # cut short, or faulty, which is refused later if the field is named
        is_named = json.dumps(text_field, ensure_ascii=False) in start
        is_cut_line = start.startswith("{") and "\n" not in start
        return "array" if opening and is_named else "lines" if is_cut_line and is_named else "text"
    return "lines" if isinstance(fields, dict) and isinstance(fields.get(text_field), str) else "text"


def _json_lines(path: Path, file: Readable, raw: io.BufferedReader, text_field: str, errors: Errors) -> Iterator[Block]:
    _refuse_binary(binary_kind(file.peek(HEAD), True), str(path), file is not raw)
    for number, line in enumerate(file, start=1):
        line = line.removeprefix(MARK.encode()) if number == 1 else line
        if line.strip():
            place = f"{path} line {number}"
            content, num_replaced = _decoded(line, place, errors)
            try:
                fields = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{place} is not JSON: {error}; every line must be an object with text") from error
            text, num_halves = _field(fields, place, text_field, errors)
            yield Block(text, True, raw.tell(), num_replaced + num_halves)


def _json_array(path: Path, blocks: Iterator[Block], text_field: str, errors: Errors) -> Iterator[Block]:
    """The elements of an array, of which one at a time is in memory, and the blocks that it lies in."""
    decode, text, number, num_replaced, least = json.JSONDecoder().raw_decode, "", 0, 0, 0
    for block in blocks:
        text += block.text
        num_replaced += block.num_replaced
        start = 0
        while len(text) >= least or block.is_last:
            gap = _JSON_GAP.match(text, start)
            assert gap is not None
            if gap.end() == len(text) and not block.is_last:
                break
            place = f"{path} element {number + 1}"
            if gap[1] == "]":
                check(gap.end() == len(text), f"{path} goes on after its array of {number} elements: leave that out")
                break
            check(gap[1] == ("," if number else "["), f"{place}: there is no comma or end of the array before it")
            try:
                fields, end = decode(text, gap.end())
            except (ValueError, RecursionError) as error:
                if not block.is_last:
                    least = 2 * (len(text) - start)  # so that a long element is not begun anew with every block
                    break
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise InputError(f"{place} is not JSON: {reason}; every element must be an object with text") from error
            whole, num_halves = _field(fields, place, text_field, errors)
            yield Block(whole, True, block.position, num_replaced + num_halves)
            start, number, num_replaced, least = end, number + 1, 0, 0
        text = text[start:]


def _field(fields: Any, place: str, text_field: str, errors: Errors) -> tuple[str, int]:
    """The text in a JSON object, and how many places in it were replaced."""
    if not isinstance(fields, dict) or not fields:
        raise InputError(f"{place} is not an object with text in a field {text_field}")
    if text_field not in fields:
        remedy = "name one with --data.text_field, or leave the file out with --data.glob"
        raise InputError(f"{place} has no field {text_field}, it has {', '.join(sorted(fields))}: {remedy}")
    text = fields[text_field]
    if not isinstance(text, str):
        raise InputError(f"{place}: its field {text_field} is not text but {json.dumps(text)[:40]}")
    try:
        text.encode()
        return text, 0
    except UnicodeEncodeError as error:
        check(
            errors == "replace",
            f"{place} holds half a surrogate pair at character {error.start}, which is no text: mend it, or let "
            "--data.errors replace put U+FFFD there",
        )
        return re.subn("[\ud800-\udfff]", "\ufffd", text)


def _decoded(content: bytes, place: str, errors: Errors) -> tuple[str, int]:
    """The bytes of a line or row as text, and how many places were replaced."""
    try:
        return content.decode(), 0
    except UnicodeDecodeError as error:
        check(
            errors == "replace",
            f"{place} is not UTF-8 text: byte 0x{content[error.start]:02x} at offset {error.start} of it; convert it, "
            "or let --data.errors replace put U+FFFD there",
        )
        text = content.decode(errors="replace")
        return text, text.count("\ufffd") - content.count(_REPLACEMENT)


def _rows(entry: Entry, text_field: str, errors: Errors) -> Iterator[Block]:
    """The documents of a parquet file, or of a data set that the `datasets` library saved."""
    path, row = entry.path, 0
    names, num_rows, batches = _saved_data_set(path) if Path(path).is_dir() else _parquet(path, text_field)
    arrow = _extra("pyarrow", path)
    check(
        text_field in names,
        f"{path} has no column {text_field}, it has {', '.join(names)}: name one with --data.text_field",
    )
    try:
        for batch in batches:
            try:
                contents = batch[text_field].cast(arrow.large_binary()).to_pylist()
            except arrow.ArrowException as error:
                kind = batch[text_field].type
                raise InputError(f"{path}: its column {text_field} is not text but {kind}") from error
            for content in contents:
                row += 1
                check(content is not None, f"{path} row {row}: its {text_field} is null, not text; leave such rows out")
                text, num_replaced = _decoded(content, f"{path} row {row}", errors)
                yield Block(text, True, entry.size * row // num_rows, num_replaced)
    except arrow.ArrowException as error:
        raise InputError(f"{path} is damaged after row {row}: {str(error).splitlines()[0]}") from error


def _parquet(path: str, text_field: str) -> tuple[list[str], int, Iterator[Any]]:
    """The names of the columns, the number of rows, and batches of them with the one column."""
    parquet, arrow = _extra("pyarrow.parquet", path), _extra("pyarrow", path)
    try:
        table = parquet.ParquetFile(path)
    except arrow.ArrowException as error:
        raise InputError(f"{path} is not a whole parquet file: {str(error).splitlines()[0]}") from error
    batches = table.iter_batches(batch_size=ROWS, columns=[text_field])
    return table.schema_arrow.names, table.metadata.num_rows, batches


def _saved_data_set(path: str) -> tuple[list[str], int, Iterator[Any]]:
    """The same of a saved data set, with all columns."""
    datasets = _extra("datasets", path)
    has_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        data = datasets.load_from_disk(path)
    except Exception as error:  # the library's own, of many kinds
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not a data set that can be loaded: {reason}") from error
    finally:
        if has_bars:
            datasets.enable_progress_bars()
    return data.column_names, len(data), data.with_format("arrow").iter(batch_size=ROWS)


def _extra(module: str, path: str) -> Any:
    """A package that only some inputs need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(f'{path} needs the package {package}: pip install -e ".[text]"') from error

"""What is no text: known by the bytes that its kind begins with, or by how many are control characters."""

import re

HEAD = 512
"""Bytes at the beginning of a file that tell its kind."""
FEW = 3
"""Control characters that even the shortest text may hold."""
LARGEST_SHARE = 0.1
"""Of control characters, in a text."""
UTF16_SHARE = 0.6
"""UTF-16 has more of every other byte than this in NULs and its alphabet's own byte, which is 4 in Cyrillic."""
SPACES_SHARE = 0.05
"""UTF-16 has more of every other byte than this in NULs where its alphabet's own byte is a tab, as in Hindi."""
_BELOW_SPACE = bytes(range(32))
_SEPARATORS = b"\x01\x02\x03\x1c\x1d\x1e\x1f"
"""What Hive, FIX and ASCII put between the fields of a text."""
_CONTROLS = bytes(set(_BELOW_SPACE) - set(b"\b\t\n\v\f\r\x1b" + _SEPARATORS))
_ALPHABETS = _CONTROLS + b"\x03"
"""Bytes of UTF-16 that stand for an alphabet: NUL for Latin, 3 for Greek, and so on."""
_KINDS = {
    rb"\xff\xfe\0\0|\0\0\xfe\xff": "UTF-32 text",
    rb"\xff\xfe|\xfe\xff": "UTF-16 text",
    rb"PK(?:\x03\x04|\x05\x06|\x07\x08)": "a zip archive, as docx, xlsx, epub and .pt are",
    rb"\x1f\x8b\x08": "packed with gzip",
    rb"BZh[1-9](?:1AY&SY.{4}[\0-\x07]|\x17rE8P\x90)": "packed with bzip2",
    rb"\xfd7zXZ\0": "packed with xz",
    rb"\]\0\0[\0-\xff]{2}": "packed with lzma",
    rb"\x28\xb5\x2f\xfd": "packed with zstd",
    rb"\x04\x22\x4d\x18": "packed with lz4",
    rb"\x1f[\x9d\xa0]": "packed with compress",
    rb"!<arch>\n": "an ar archive",
    rb"7z\xbc\xaf\x27\x1c": "a 7z archive",
    rb"Rar!\x1a\x07": "a rar archive",
    rb".{257}ustar(?:\0|  \0)|[^\0][^\n]{98}\0[ 0-7\0]{24}[ 0-7]{11}[ \0]": "a tar archive",
    rb"PAR1\x15": "a parquet file, whose name must end in .parquet",
    rb"ARROW1\0\0|\xff{4}.{2}\0\0": "an arrow file; of a saved data set give the folder",
    rb"Obj\x01.*avro\.(?:schema|codec)": "an avro file",
    rb"\x89HDF\r\n\x1a\n": "an HDF5 file",
    rb"SQLite format 3\0": "an SQLite database",
    rb"\x93NUMPY": "a NumPy file",
    rb"\x80[\x02-\x05]": "a pickle",
    rb".{2,5}\0{3,6}\{\"": "a safetensors file",
    rb"GGUF.\0": "a GGUF file",
    rb"%PDF-\d\.\d[\r\n]": "a PDF",
    rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an old Office document",
    rb"\x89PNG\r\n\x1a\n": "a PNG image",
    rb"\xff\xd8\xff": "a JPEG image",
    rb"GIF8[79]a.{1,6}\0": "a GIF image",
    rb"II\*\0|MM\0\*": "a TIFF image",
    rb"RIFF.{3}[\0-\x08](?:WAVE|AVI |WEBP)|ID3[\2-\4]\0|OggS\0|fLaC\0|\0\0..ftyp": "sound, a picture or a film",
    rb"\x7fELF|\xcf\xfa\xed\xfe|\xca\xfe\xba\xbe|\0asm": "a program",
}
"""The beginnings of files, as regular expressions, and what is said of such a file."""


def binary_kind(block: bytes, is_start: bool) -> str | None:
    """What a block of a file is where that is no UTF-8 text; None where it may be.

    Args:
        block: some of its bytes.
        is_start: whether the file begins with them; else a short block, which has few to judge by, may be anything.
    """
    if is_start:
        head = block[:HEAD]
        for beginning, kind in _KINDS.items():
            if re.match(beginning, head, re.DOTALL):
                return kind
        return _kind_by_share(head) or _kind_by_share(block)
    return _kind_by_share(block) if len(block) >= HEAD else None


def _kind_by_share(block: bytes) -> str | None:
    if _is_utf16(block):
        return "UTF-16 text without its mark"
    return "a binary file" if _count(_CONTROLS, block) > max(FEW, LARGEST_SHARE * len(block)) else None


def _is_utf16(block: bytes) -> bool:
    """Whether most of every other byte stands for an alphabet. Tabs do so only where there are spaces in UTF-16 too."""
    if len(block) <= 2 * FEW:
        return False
    text, alphabet = sorted((block[::2], block[1::2]), key=lambda half: _count(_BELOW_SPACE, half) / len(half))
    if not _count(_BELOW_SPACE, text) / len(text) < 0.5 < _count(_BELOW_SPACE, alphabet) / len(alphabet):
        return False
    if _count(_ALPHABETS, alphabet) > UTF16_SHARE * len(alphabet):
        return True
    has_spaces = (ord(" "), 0) in zip(text, alphabet, strict=False)
    return has_spaces and alphabet.count(0) > SPACES_SHARE * len(alphabet)


def _count(which: bytes, block: bytes) -> int:
    return len(block) - len(block.translate(None, which))

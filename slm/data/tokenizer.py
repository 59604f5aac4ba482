"""Text <-> token ids: its bytes, or byte-level BPE (Sennrich et al., 2016) as GPT-2 has it."""

import json
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slm.errors import InputError, check

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

NUM_BYTES = 256
END_OF_TEXT = "<|endoftext|>"
ENDS_OF_TEXT = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "<|im_end|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "[SEP]",
    "<end_of_text>",
)
"""What tokenizers call the token that closes a document; the first that there is."""
PIECE_SIZE = 2**14
"""Characters that are encoded at once: a whole document would be, but for memory, and for the cores that share it."""


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE: itself where it is visible, else one from 256 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(NUM_BYTES, 2 * NUM_BYTES))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(NUM_BYTES)]


class ByteTokenizer:
    """Every byte of UTF-8 is a token; the one that closes a document is a byte that UTF-8 never contains."""

    name = "bytes"
    vocab_size = NUM_BYTES
    end_of_text = 0xFF
    typecode = "B"
    is_exact = True
    pieces = (*(bytes([byte]) for byte in range(end_of_text)), b"")

    def encode(self, pieces: Sequence[tuple[str, bool]]) -> bytes:
        """The ids of consecutive pieces of text, each with whether its document ends with it, closed there."""
        closed = bytes([self.end_of_text])
        return b"".join(text.encode() + closed if is_last else text.encode() for text, is_last in pieces)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without ends of text; U+FFFD stands for what is no whole character."""
        return bytes(token for token in ids if token != self.end_of_text).decode(errors="replace")

    def token_bytes(self) -> Tensor:
        """How many bytes of text each id (V,) stands for."""
        return torch.tensor([float(len(piece)) for piece in self.pieces])

    def dump(self) -> str:
        """A value from which `load_tokenizer` makes it again."""
        return "bytes"


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library.

    Args:
        content: its JSON.
        name: where that is from.

    Raises:
        InputError: it is no such JSON, it has no token to close a document with, or the library is not there.
    """

    def __init__(self, content: str, name: str = "the tokenizer") -> None:
        library = import_tokenizers()
        try:
            self._tokenizer: Library = library.Tokenizer.from_str(content)
        except Exception as error:  # the library raises no narrower one
            raise InputError(f"{name} is no tokenizer.json of the tokenizers library: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # their names in a text are text
        vocabulary = self._tokenizer.get_vocab()
        check(bool(vocabulary), f"{name} has no tokens at all")
        closing = [token for token in ENDS_OF_TEXT if token in vocabulary]
        check(bool(closing), f"{name} has no token that ends a text: add one of {', '.join(ENDS_OF_TEXT)}")
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_text = vocabulary[closing[0]]
        self.typecode = "H" if self.vocab_size <= 2**16 else "I"
        self.name = f"BPE of {self.vocab_size} ids, {blake2b(self.dump().encode(), digest_size=4).hexdigest()}"

    def encode(self, pieces: Sequence[tuple[str, bool]]) -> bytes:
        """The ids of consecutive pieces of text, each with whether its document ends with it, closed there."""
        texts = [text for text, _ in pieces]
        ids = array(self.typecode)
        for encoding, (_, is_last) in zip(
            self._tokenizer.encode_batch_fast(texts, add_special_tokens=False), pieces, strict=True
        ):
            ids.fromlist(encoding.ids)
            if is_last:
                ids.append(self.end_of_text)
        return ids.tobytes()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without ends of text; U+FFFD stands for what is no whole character."""
        return self._tokenizer.decode([token for token in ids if token != self.end_of_text], skip_special_tokens=False)

    @cached_property
    def is_exact(self) -> bool:
        """Whether it is byte-level as GPT-2's is, so that any text comes back exactly; of others that is not known."""
        settings = json.loads(self.dump())
        pre = settings.get("pre_tokenizer") or {}
        steps = pre.get("pretokenizers", [pre])
        return (
            settings.get("normalizer") is None
            and (settings.get("decoder") or {}).get("type") == "ByteLevel"
            and steps[-1].get("type") == "ByteLevel"
            and not steps[-1]["add_prefix_space"]
            and all(
                step.get("type") == "Digits" or (step.get("type") == "Split" and step["behavior"] == "Isolated")
                for step in steps[:-1]
            )
            and set(import_tokenizers().pre_tokenizers.ByteLevel.alphabet()) <= self._tokenizer.get_vocab().keys()
        )

    @cached_property
    def pieces(self) -> Sequence[bytes] | None:
        """The bytes of text that each id stands for; None where that depends on the ids beside it, or is not known."""
        if not self.is_exact:
            return None
        byte_of = {character: bytes([byte]) for byte, character in enumerate(byte_characters())}
        pieces = [b""] * self.vocab_size
        for token, index in self._tokenizer.get_vocab(with_added_tokens=False).items():
            pieces[index] = b"".join(byte_of.get(character, character.encode()) for character in token)
        for token in json.loads(self.dump())["added_tokens"]:
            pieces[token["id"]] = b"" if token["special"] else token["content"].encode()
        return pieces

    def token_bytes(self) -> Tensor | None:
        """How many bytes of text each id (V,) stands for; None where that is not known."""
        return None if self.pieces is None else torch.tensor([float(len(piece)) for piece in self.pieces])

    def dump(self) -> str:
        """The JSON of the library, from which `load_tokenizer` makes it again."""
        return self._content

    @cached_property
    def _content(self) -> str:
        return self._tokenizer.to_str()


Tokenizer = ByteTokenizer | SubwordTokenizer


def load_tokenizer(dumped: str) -> Tokenizer:
    """The tokenizer that `dump` wrote, as a checkpoint holds it."""
    return ByteTokenizer() if dumped == "bytes" else SubwordTokenizer(dumped)


def read_tokenizer(path: Path) -> SubwordTokenizer:
    """A `tokenizer.json`; raises InputError where it cannot be read, or see `SubwordTokenizer`."""
    try:
        return SubwordTokenizer(path.read_text(encoding="utf-8-sig"), str(path))
    except OSError as error:
        raise InputError(
            f"data.tokenizer={path} cannot be read: {error.strerror}; give bytes, bpe or a file"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"data.tokenizer={path} is not UTF-8 text: give a tokenizer.json") from error


def train_bpe(texts: Iterator[str], vocab_size: int) -> SubwordTokenizer:
    """Byte-level BPE with GPT-2's way of cutting words, its merges learned from these texts.

    It has the 256 bytes, the end of text, and as many merges as `vocab_size` leaves room for or the texts give.

    Raises:
        InputError: there is no room, or the library is not there.
    """
    check(
        vocab_size > NUM_BYTES,
        f"vocab_size={vocab_size} is too small for byte-level BPE, which has {NUM_BYTES} bytes and the end of text: "
        "give it more, such as --model.vocab_size 10000",
    )
    library = import_tokenizers()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return SubwordTokenizer(tokenizer.to_str())


LETTERS_AROUND_A_SPACE = re.compile(r".*\w(?= \w)", re.DOTALL)
OTHER_WHITESPACE = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)


def cut(text: str, start: int) -> int:
    """Where the piece that begins at `start` ends, so that its tokens are those that the whole text has there.

    That is before a space between letters, or before other whitespace. Where a piece has neither, it is cut anywhere;
    the tokens there may then differ from those of the whole, but never the text that they give back.
    """
    stop = start + PIECE_SIZE
    found = LETTERS_AROUND_A_SPACE.match(text, start, stop + 2) or OTHER_WHITESPACE.match(text, start, stop + 1)
    return found.end() if found else stop


def import_tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise InputError('byte-level BPE needs the package tokenizers: pip install -e ".[text]"') from error
    return tokenizers

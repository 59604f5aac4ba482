"""Token ids, one after another -> their text, as soon as it can be shown."""

import codecs
from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache

from slm.data.tokenizer import Tokenizer, load_tokenizer
from slm.errors import check


class Numbers:
    """Tokens that stand for no text, such as those of dummy data: they are read and written as their numbers."""

    end_of_text = None
    typecode = "q"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.pieces = [f" {number}".encode() for number in range(vocab_size)]

    def encode(self, pieces: Sequence[tuple[str, bool]]) -> bytes:
        """The ids that the pieces name, with spaces between them; raises InputError where that is no id."""
        names = " ".join(text for text, _ in pieces).split()
        for name in names:
            is_id = name.isascii() and name.isdigit() and len(name) < 19 and int(name) < self.vocab_size
            check(
                is_id,
                f"{name!r} is no token id: this model was trained without a tokenizer, its text is numbers from 0 to "
                f"{self.vocab_size - 1}, such as '5 17'",
            )
        return array(self.typecode, map(int, names)).tobytes()

    def decode(self, ids: Iterable[int]) -> str:
        """The numbers of the ids."""
        return " ".join(map(str, ids))


@lru_cache(maxsize=1)
def stored_tokenizer(dumped: str | None, vocab_size: int) -> Tokenizer | Numbers:
    """The tokenizer that a checkpoint holds, or numbers where it has none; the last one is kept."""
    return Numbers(vocab_size) if dumped is None else load_tokenizer(dumped)


class TextStream:
    """The text of one sequence that grows by a token at a time.

    A character is shown when its last byte is there, and what may become a stop text when it no longer can.

    Args:
        tokenizer: of the ids.
        before: the ids that come before the first.
        stops: texts that end it, none of them empty; they are not shown.
    """

    def __init__(self, tokenizer: Tokenizer | Numbers, before: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.is_over = False
        self._tokenizer = tokenizer
        self._ids = list(before)
        self._num_decoded = len(tokenizer.decode(self._ids))
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        if tokenizer.pieces is not None:
            self._utf8.decode(b"".join(tokenizer.pieces[token] for token in self._ids[-4:]))  # may end in a character
        self._stops = stops
        self._held = ""

    def add(self, token: int) -> str:
        """What can be shown now that `token` is there; the end of a text sets `is_over`."""
        if token == self._tokenizer.end_of_text:
            return self.finish()
        self._held += self._decoded(token)
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            text, self._held = self._held[: min(found)], ""
            self.is_over = True
            return text
        may_be = (n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        shown = len(self._held) - max(may_be, default=0)
        text, self._held = self._held[:shown], self._held[shown:]
        return text

    def finish(self) -> str:
        """What was held back as the beginning of a stop text; the bytes of half a character are left out."""
        self.is_over = True
        text, self._held = self._held, ""
        return text

    def _decoded(self, token: int) -> str:
        """The characters that are whole now."""
        if self._tokenizer.pieces is not None:
            return self._utf8.decode(self._tokenizer.pieces[token])
        self._ids.append(token)  # it may look different after what comes before it
        text = self._tokenizer.decode(self._ids)
        start = self._num_decoded
        self._num_decoded = len(text.rstrip("\ufffd"))
        return text[start : self._num_decoded]

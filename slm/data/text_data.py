"""Text from files as training data."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slm.data.corpus import Facts, own_bpe, saved_tokens, token_stream
from slm.data.files import ANY, Errors, Text, find_text, find_texts
from slm.data.token_data import TokenData, refuse_other_tokenizer
from slm.data.tokenizer import NUM_BYTES, ByteTokenizer, SubwordTokenizer, Tokenizer, load_tokenizer, read_tokenizer
from slm.errors import check
from slm.messages import say

NAMED_TOKENIZERS = ("bytes", "bpe")


class TextData(TokenData):
    """Text from files, as bytes or as the tokens of a tokenizer; or tokens that another program has saved.

    A file is UTF-8 text, `.jsonl` or `.ndjson`, `.json` with objects in an array or in its lines (any other is text),
    `.parquet`, or `.bin` with the uint16 tokens of nanoGPT's scripts. All but the last two may be packed, with `.gz`
    after the name. A folder is searched for such files, or is a saved Hugging Face data set, or holds nanoGPT's
    `train.bin` and `val.bin`. If it has a split of its own (`slm.data.files.find_texts`), only the one for training is
    trained on, and the one for validation, or else for tests, is held out.

    Args:
        path: a file or a folder; None is the English documentation inside every Python.
        glob: which files of a folder: `*` and `?` stand for characters of a name, `**/` for any folders.
        text_field: the field of an object of JSON, or column of a table, that holds the text.
        errors: `strict` refuses what is not UTF-8, `replace` puts U+FFFD in its place, in up to a tenth of
            a text, and counts.
        val_path: text to hold out, instead of the folder's own split or the last `val_fraction` of `path`.
        tokenizer: `bytes`; `bpe`, byte-level BPE whose merges are learned from the training text until there are
            `vocab_size` ids; or the path of a `tokenizer.json`.
    """

    facts: Facts
    held_out_facts: Facts
    _tokenizer: Tokenizer | None = None

    def __init__(
        self,
        *args: Any,
        path: str | None = None,
        glob: str = ANY,
        text_field: str = "text",
        errors: Errors = "strict",
        val_path: str | None = None,
        tokenizer: str = "bytes",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        for name, value in (("path", path), ("val_path", val_path), ("tokenizer", tokenizer), ("glob", glob)):
            check(value != "", f"data.{name} is empty: give one, or leave it out")
        reading = {"text_field": text_field, "errors": errors}
        self._train, self._held_out = find_texts(None if path is None else Path(path), glob, **reading)
        if val_path is not None:
            self._held_out = find_text(Path(val_path), glob, "data.val_path", **reading)
        self._is_text = not self._train.is_tokens
        self._continued: Tokenizer | None = None
        vocab_size = self.hparams["vocab_size"]
        check(
            vocab_size == NUM_BYTES or tokenizer != "bytes" or not self._is_text,
            f"vocab_size={vocab_size} does not fit text as bytes, which has {NUM_BYTES} ids: "
            f"use --model.vocab_size {NUM_BYTES}, or --data.tokenizer bpe",
        )
        can_learn = self._is_text or tokenizer != "bpe"
        check(can_learn, f"data.tokenizer=bpe cannot learn from {path}, which holds tokens: leave it out")
        are_of_a_kind = self._held_out is None or self._held_out.is_tokens != self._is_text
        check(are_of_a_kind, f"of data.path={path} and data.val_path={val_path} only one is a .bin of tokens: give two")

    def continue_with(self, tokenizer: str | None) -> None:
        asked, stored = self.hparams["tokenizer"], None if tokenizer is None else load_tokenizer(tokenizer)
        is_file = asked not in NAMED_TOKENIZERS
        if asked == "bpe" or (is_file and not Path(asked).exists()):  # what it learned, or read, is in the checkpoint
            fits, name = isinstance(stored, SubwordTokenizer), asked
        else:
            own = self._own_tokenizer()
            name = own.name if own else None
            fits = (own.dump() if own else None) == (stored.dump() if stored else None)
        refuse_other_tokenizer(fits, stored.name if stored else None, name)
        self._continued = stored

    def stream(self) -> Tensor:
        tokenizer = self._continued or self._own_tokenizer()
        asked, vocab_size = self.hparams["tokenizer"], self.hparams["vocab_size"]
        if tokenizer is not None and tokenizer.vocab_size != vocab_size:
            fewer = asked == "bpe" and tokenizer.vocab_size < vocab_size
            has = "the text has merges for only" if fewer else "it has"
            remedy = f"use --model.vocab_size {tokenizer.vocab_size}"
            message = f"data.tokenizer={asked}: {has} {tokenizer.vocab_size} ids, vocab_size={vocab_size}: {remedy}"
            check(fewer, message)
            if self._continued is None:  # else the weights have that many
                say(f"{message}, since the others are never seen")
        self._tokenizer = tokenizer
        tokens, self.facts = self._read(self._train)
        if tokenizer is not None:
            self.tokenizer, self.token_bytes = tokenizer.dump(), tokenizer.token_bytes()
        return tokens

    def held_out_stream(self) -> Tensor | None:
        tokens, self.held_out_facts = (None, self.facts) if self._held_out is None else self._read(self._held_out)
        facts = self.held_out_facts
        if self.token_bytes is None and facts.num_bytes is not None and facts.is_exact:
            self.token_bytes = torch.full((self.hparams["vocab_size"],), facts.num_bytes / facts.num_tokens)
        return tokens

    def digest(self, stream: Tensor) -> bytes:
        return b"".join(bytes.fromhex(facts.digest) for facts in self._all_facts())

    def at_a_glance(self, num_parameters: int) -> Iterator[str]:
        assert self.train_windows is not None
        assert self.val_windows is not None
        facts = self.facts
        documents = "document" if facts.num_documents == 1 else "documents"
        of_text = f"{facts.num_documents:,} {documents}, {facts.num_bytes:,} bytes, " if facts.num_documents else ""
        each = f" ({facts.num_bytes / facts.num_tokens:.2f} bytes each)" if facts.num_bytes else ""
        windows = f"{len(self.train_windows):,} windows to train on in an epoch, {len(self.val_windows):,} held out"
        if self._held_out is not None:
            windows += f" of {self._held_out.place}"
            val_fraction = self.hparams["val_fraction"]
            is_default = val_fraction == inspect.signature(TokenData).parameters["val_fraction"].default
            windows += "" if is_default else f", so that data.val_fraction={val_fraction} does nothing"
        yield f"{self._train.place}: {of_text}{facts.num_tokens:,} tokens{each}, {windows}"
        if self._held_out is None and self._train.note:
            yield self._train.note
        if num_replaced := sum(part.num_replaced for part in self._all_facts()):
            yield f"{num_replaced:,} places in it are not UTF-8: U+FFFD stands for each"
        if not all(part.is_exact for part in self._all_facts()):
            yield "its tokens do not give all of it back as it was, so its bits per byte are not known"
        ratio = len(self.train_windows.stream) / num_parameters
        if ratio < 1:
            yield (
                f"the text is small for the model: {ratio:.2f} training tokens per parameter; below 1 a model can "
                "learn it by heart: watch val/loss, raise --model.dropout, or use a smaller model or more text"
            )

    def _own_tokenizer(self) -> Tokenizer | None:
        asked = self.hparams["tokenizer"]
        if asked == "bpe":
            share = 1.0 if self._held_out is not None else 1.0 - self.hparams["val_fraction"]
            return own_bpe(self._train, self.hparams["vocab_size"], share)
        if asked == "bytes":
            return ByteTokenizer() if self._is_text else None
        return read_tokenizer(Path(asked))

    def _all_facts(self) -> list[Facts]:
        return [self.facts] if self._held_out is None else [self.facts, self.held_out_facts]

    def _read(self, text: Text) -> tuple[Tensor, Facts]:
        if self._is_text:
            assert self._tokenizer is not None
            return token_stream(text, self._tokenizer)
        tokens, facts = saved_tokens(text)
        vocab_size, largest = self.hparams["vocab_size"], facts.largest
        assert largest is not None
        check(
            largest < vocab_size,
            f"{text.place}: token {facts.largest_at} is {largest}, outside the vocabulary of vocab_size={vocab_size}: "
            f"use --model.vocab_size {largest + 1} or more",
        )
        return tokens, facts

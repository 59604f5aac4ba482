"""Text out of a trained model: `python -m slm.generate --ckpt_path best --prompt "The "`."""

import io
import re
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slm.command.exit_codes import ends_in_one_line
from slm.command.flags import new_parser, parse_flags
from slm.data.documents import MARK, read_text
from slm.data.text_stream import TextStream, stored_tokenizer
from slm.errors import InputError, check
from slm.hardware import prepare_cpu, writing_device
from slm.messages import say
from slm.model.sampling import Sampler, decode
from slm.run.checkpoint import open_checkpoint
from slm.run.loading import restore_network


@dataclass(frozen=True)
class Settings:
    """How a text goes on.

    Args:
        max_new_tokens: where it ends, unless the model ends it before.
        temperature: how bold the choice of each token is; 0 takes the likeliest.
        top_k: how many of the likeliest tokens there are to choose from; null for all.
        top_p: share of the probability that the likeliest tokens to choose from have together.
        seed: of the choices.
        num_samples: how many texts, made at the same time; each is what its seed, counted on, gives alone.
        stop: a text that ends it and is not shown, or several.

    Raises:
        InputError: a value out of its range.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    num_samples: int = 1
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        check(self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens} must be at least 1")
        check(self.num_samples >= 1, f"num_samples={self.num_samples} must be at least 1")
        check(all(self.stop), "stop='' would end every text: give a text that is not empty")
        Sampler(self.temperature, self.top_k, self.top_p, self.seed)

    def sampler(self) -> Sampler:
        """What chooses the tokens of all samples."""
        return Sampler(self.temperature, self.top_k, self.top_p, self.seed, self.num_samples)


class Writer:
    """A trained model that goes on with texts.

    Args:
        ckpt_path: `last` or `best` (of the newest run under `runs/`), a run folder (its best), a `.ckpt` or a `.pt`.
        accelerator: where it computes: cpu, cuda, mps, or the GPU that is there (auto).

    Raises:
        InputError: there is no such checkpoint or accelerator.
    """

    def __init__(self, ckpt_path: str | Path = "best", accelerator: str = "auto") -> None:
        device = writing_device(accelerator)
        self.path, content = open_checkpoint(ckpt_path, prefer="best")
        self.transformer = restore_network(self.path, content).to(device)
        self.tokenizer = stored_tokenizer(content.get("tokenizer"), content["hyper_parameters"]["vocab_size"])

    def stream(self, prompt: str, settings: Settings) -> Iterator[tuple[int, str]]:
        """The prompt and what the model writes after it, in pieces, each with the number of its sample, in order.

        The first sample comes as it is made, and the others, which are made beside it, as soon as they are next.

        Raises:
            InputError: the prompt is not UTF-8, or for a model without tokenizer not the numbers of tokens.
        """
        ids = self._ids(prompt)
        seen = self.transformer.max_seq_len
        if len(ids) > seen:
            say(f"the prompt has {len(ids)} tokens: the model sees the last {seen}, its context")
        texts = [TextStream(self.tokenizer, ids, settings.stop) for _ in range(settings.num_samples)]
        pieces, sampler = [prompt] * settings.num_samples, settings.sampler()
        vocab_size = self.tokenizer.vocab_size  # of the model it may be larger
        tokens = torch.tensor([ids] * settings.num_samples, device=self.transformer.output_weight.device)
        steps = decode(self.transformer, tokens, lambda logits: sampler(logits[:, :vocab_size]))
        turn = 0
        for step, chosen in enumerate(steps, start=1):
            for row, (text, token) in enumerate(zip(texts, chosen.tolist(), strict=True)):
                if not text.is_over:
                    pieces[row] += text.add(token)
                    pieces[row] += text.finish() if step == settings.max_new_tokens else ""
            while turn < len(texts):
                if pieces[turn]:
                    yield turn, pieces[turn]
                    pieces[turn] = ""
                if not texts[turn].is_over:
                    break
                turn += 1
            else:
                return

    def _ids(self, prompt: str) -> list[int]:
        try:
            prompt.encode()
            ids = array(self.tokenizer.typecode, self.tokenizer.encode([(prompt, False)])).tolist()
        except UnicodeEncodeError as error:
            raise InputError(f"prompt={prompt!r} is not UTF-8 text") from error
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error
        if ids:
            return ids
        if self.tokenizer.end_of_text is None:
            raise InputError(f"the prompt is empty: {self.path} has no tokenizer, it needs a token to begin with")
        return [self.tokenizer.end_of_text]


def write(prompt: str = "", ckpt_path: str | Path = "best", accelerator: str = "auto", **settings: Any) -> str:
    """The prompt, and what a trained model writes after it; a document is begun where the prompt is empty.

    Arguments and errors are those of `Writer` and `Settings`; of several samples it gives the first.
    """
    pieces = Writer(ckpt_path, accelerator).stream(prompt, Settings(**settings))
    return "".join(piece for sample, piece in pieces if sample == 0)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = new_parser("generate")
    parser.add_class_arguments(Writer)
    parser.add_argument("--prompt", action="append", default=[], help="a text to go on with; may be given again")
    parser.add_argument("--prompt_file", action="append", default=[], help="a UTF-8 file that is one; likewise")
    parser.add_class_arguments(Settings, skip={"stop"})
    parser.add_argument("--stop", action="append", default=[], help="a text that ends what is written; likewise")
    prepare_cpu()
    with ends_in_one_line():
        given = vars(parse_flags(parser, argv))
        prompts = [
            *given.pop("prompt"),
            *(read_text(Path(path), f"prompt_file={path}") for path in given.pop("prompt_file")),
        ]
        ckpt_path, accelerator = given.pop("ckpt_path"), given.pop("accelerator")
        settings = Settings(**given)
        writer = Writer(ckpt_path, accelerator)
        if str(ckpt_path) in ("last", "best"):
            say(f"{ckpt_path} is {writer.path}")
        for number, prompt in enumerate(prompts, start=1):
            _show(writer, prompt, settings, f"prompt {number} of {len(prompts)}" if len(prompts) > 1 else "")
        if not prompts:
            _converse(writer, settings)


def _show(writer: Writer, prompt: str, settings: Settings, name: str = "") -> None:
    """Print the texts as they are made; where there are several, stderr says before each which it is."""
    before = -1
    for sample, piece in writer.stream(prompt, settings):
        if sample != before:
            print(end="\n" if before >= 0 else "", flush=True)
            names = [name, f"sample {sample + 1} of {settings.num_samples}" if settings.num_samples > 1 else ""]
            if any(names):
                say(f"--- {', '.join(filter(None, names))}")
            before = sample
        print(piece, end="", flush=True)
    print(flush=True)


def _converse(writer: Writer, settings: Settings) -> None:
    """Go on with each line of the standard input; Ctrl-C in a terminal ends a text, Ctrl-D all of it."""
    no_prompt = "there is no prompt: give --prompt, --prompt_file, or lines to standard input"
    if sys.stdin is None:  # it was closed
        raise InputError(no_prompt)
    is_terminal, found = sys.stdin.isatty(), False
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(
            encoding="utf-8", errors="surrogateescape", newline="\n"
        )  # the prompt refuses what is not
    while True:
        if is_terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except OSError as error:
            raise InputError(f"standard input cannot be read: {error.strerror}; give --prompt") from error
        if not line:
            check(found or is_terminal, no_prompt)
            return
        if prompt := re.sub(r"\r?\n\Z", "", line if found else line.removeprefix(MARK)):
            found = True
            try:
                _show(writer, prompt, settings)
            except (KeyboardInterrupt, InputError) as error:
                if not is_terminal:
                    raise
                print(flush=True)
                if isinstance(error, InputError):
                    say(f"error: {error}")


if __name__ == "__main__":
    main()

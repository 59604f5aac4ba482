"""Text out of a trained model."""

import sys
from array import array
from collections.abc import Iterator, Sequence

import jsonargparse
import torch
from torch import Tensor

from slm.checkpoint import open_checkpoint
from slm.endings import ends_in_one_line
from slm.errors import InputError, check
from slm.module import LanguageModel, load
from slm.notices import explain_parser_error
from slm.tokenizer import load_tokenizer


@torch.inference_mode()
def next_tokens(model: LanguageModel, tokens: Tensor, temperature: float, generator: torch.Generator) -> Iterator[int]:
    """The tokens that a model in eval mode goes on with after `tokens` (T,), int64, one after another, without end.

    It sees the last `max_seq_len` of them. A temperature of 0 takes the likeliest.
    """
    while True:
        window = tokens[-model.hparams["max_seq_len"] :]
        hidden = model.transformer(window[None])  # (1, T, D)
        logits = model.transformer.logits(hidden[:, -1])[0].float()  # (V,)
        if temperature == 0:
            token = logits.argmax()
        else:
            token = torch.multinomial(((logits - logits.max()) / temperature).softmax(0), 1, generator=generator)[0]
        yield int(token)
        tokens = torch.cat([tokens, token[None]])


def write(
    ckpt_path: str = "best", prompt: str = "", max_new_tokens: int = 200, temperature: float = 0.8, seed: int = 0
) -> str:
    """The prompt, and what a trained model writes after it.

    Args:
        ckpt_path: `last` or `best` (of the newest run under `runs/`), a run folder (its best), a `.ckpt` or a `.pt`.
        prompt: the text to go on with; without one, a document is begun.
        max_new_tokens: where to stop, unless the document ends before.
        temperature: how bold the choice of each token is; 0 takes the likeliest.
        seed: of that choice.

    Raises:
        InputError: there is no such checkpoint, or it has no tokenizer; or a value is out of its range.
    """
    check(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be at least 1")
    check(temperature >= 0, f"temperature={temperature} must be at least 0")
    check(0 <= seed < 2**63, f"seed={seed} must be at least 0 and below 2**63")
    path, content = open_checkpoint(ckpt_path, prefer="best")
    dumped = content.get("tokenizer")
    check(dumped is not None, f"{path} was trained on tokens without a tokenizer: it has no text to write")
    tokenizer, model = load_tokenizer(str(dumped)), load(path)
    try:
        ids = array(tokenizer.typecode, tokenizer.encode([(prompt, False)])).tolist() or [tokenizer.end_of_text]
    except UnicodeEncodeError as error:
        raise InputError(f"prompt={prompt!r} is not UTF-8 text") from error
    generator = torch.Generator().manual_seed(seed)
    written: list[int] = []
    for token in next_tokens(model, torch.tensor(ids), temperature, generator):
        if token == tokenizer.end_of_text:
            break
        written.append(token)
        if len(written) == max_new_tokens:
            break
    return prompt + tokenizer.decode(ids + written)[len(tokenizer.decode(ids)) :]  # after it, not as if it began there


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = jsonargparse.ArgumentParser(prog="python -m slm.generate", exit_on_error=False, allow_abbrev=False)
    parser.add_function_arguments(write)
    with ends_in_one_line():
        try:
            settings = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
        except jsonargparse.ArgumentError as error:
            raise InputError(
                explain_parser_error(str(error), dict.fromkeys(parser.get_defaults().keys(), ""))
            ) from error
        print(write(**settings))


if __name__ == "__main__":
    main()

"""How fast text comes: `python -m slm.generate_benchmark`, beside Hugging Face's GPT-2 where `transformers` is there.

Both have the same weights and draw the same number of tokens, and take turns, so that what else the machine does falls
on both alike. Two cores of an Intel Xeon with AVX512 printed, among other rows:

| context | batch | slm, tokens/s (lowest to highest) | Hugging Face, tokens/s | ratio |
|---|---|---|---|---|
| 128 | 1 | 574 (549 to 592) | 171 | 3.3 |
| 1024 | 64 | 5,512 (5,250 to 5,930) | 1,291 | 4.3 |
"""

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import islice

import torch

from slm.command.exit_codes import ends_in_one_line
from slm.command.flags import new_parser, parse_flags
from slm.errors import check
from slm.formats.hugging_face import as_transformers
from slm.hardware import prepare_cpu, writing_device
from slm.messages import say
from slm.model.sampling import Sampler, decode
from slm.training.language_model import LanguageModel

PROMPT_TOKENS = 8
Continue = Callable[[], object]


def measure(
    batch_sizes: Sequence[int] = (1, 4, 16, 64),
    contexts: Sequence[int] = (128, 1024),
    rounds: int = 3,
    accelerator: str = "auto",
) -> None:
    """Print how many tokens a second the default model writes at each batch size and context.

    Each context is filled but for eight tokens, the prompt.

    Args:
        batch_sizes: sequences that are written at once.
        contexts: the model's longest sequence, in tokens; more than eight.
        rounds: of which the median is taken.
        accelerator: cpu, cuda, mps, or the GPU that is there (auto).

    Raises:
        InputError: a value out of its range.
    """
    check(rounds >= 1, f"rounds={rounds} must be at least 1")
    check(all(size >= 1 for size in batch_sizes), f"batch_sizes={list(batch_sizes)} must be at least 1")
    fits = all(context > PROMPT_TOKENS for context in contexts)
    check(fits, f"contexts={list(contexts)} must be above {PROMPT_TOKENS}, the tokens of the prompt")
    device = torch.device(writing_device(accelerator))
    has_peer = importlib.util.find_spec("transformers") is not None
    if not has_peer:
        say('Hugging Face is not measured, which needs the package transformers: pip install -e ".[export]"')
    print("| context | batch | slm, tokens/s (lowest to highest) | Hugging Face, tokens/s | ratio |")
    print("|---|---|---|---|---|")
    for context in contexts:
        for batch_size in batch_sizes:
            print(_row(context, batch_size, rounds, device, has_peer), flush=True)


def _row(context: int, batch_size: int, rounds: int, device: torch.device, has_peer: bool) -> str:
    model = LanguageModel(max_seq_len=context).eval().to(device)
    num_tokens = context - PROMPT_TOKENS
    prompt = torch.randint(model.hparams["vocab_size"], (batch_size, PROMPT_TOKENS), device=device)

    def ours() -> None:
        sampler = Sampler(temperature=1.0, batch_size=batch_size)
        for tokens in islice(decode(model.transformer, prompt, sampler), num_tokens):
            tokens.tolist()

    loops: list[Continue] = [ours, *([_hugging_face(model, prompt, num_tokens)] if has_peer else [])]
    speeds: list[list[float]] = [[] for _ in loops]
    for number in range(rounds + 1):
        for loop, measured in zip(loops, speeds, strict=True):
            start = time.perf_counter()
            loop()
            if number:  # the first warms up
                measured.append(batch_size * num_tokens / (time.perf_counter() - start))
    mine, *others = (statistics.median(measured) for measured in speeds)
    theirs = f"{others[0]:,.0f} | {mine / others[0]:.1f}" if others else "not installed |"
    return f"| {context} | {batch_size} | {mine:,.0f} ({min(speeds[0]):,.0f} to {max(speeds[0]):,.0f}) | {theirs} |"


def _hugging_face(model: LanguageModel, prompt: torch.Tensor, num_tokens: int) -> Continue:
    """The library's own `generate` with its cache."""
    peer = as_transformers(model, None).eval().to(prompt.device)
    settings = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "pad_token_id": 0}
    return lambda: peer.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, use_cache=True, **settings
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = new_parser("generate_benchmark")
    parser.add_function_arguments(measure)
    prepare_cpu()
    with ends_in_one_line():
        measure(**vars(parse_flags(parser, argv)))


if __name__ == "__main__":
    main()

"""Tokens out of a trained network, one after another.

B batch, T time, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from slm.errors import check
from slm.transformer import Transformer


@torch.inference_mode()
def decode(transformer: Transformer, tokens: Tensor, choose: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """The tokens (B,) that go on from tokens (B, T) of at least one position, one after another, without end.

    The network sees each token once, and keeps its keys and values. It has learned positions up to `max_seq_len`, so
    where the sequence is longer, it begins anew with the last half of that many tokens, and keeps on from there: what
    it sees is never less than that. Of tokens that are more from the start it sees the last `max_seq_len`.

    Args:
        transformer: in eval mode.
        tokens: int64, on its device.
        choose: the next token (B,) of each sequence, from logits (B, V).
    """
    window = tokens[:, -transformer.max_seq_len :]
    unseen, cache = window, transformer.new_cache()
    while True:
        hidden = transformer.forward(unseen, cache)  # not through a call, which may be compiled for other shapes
        chosen = choose(transformer.logits(hidden[:, -1]))
        yield chosen
        unseen = chosen[:, None]
        window = torch.cat([window, unseen], dim=1)
        if window.shape[1] > transformer.max_seq_len:
            unseen = window = window[:, -max(1, transformer.max_seq_len // 2) :]
            cache = transformer.new_cache()


class Sampler:
    """Chooses the next token of each sequence: the likeliest at a temperature of 0, else one is drawn.

    Args:
        temperature: what the logits are divided by.
        top_k: how many of the likeliest tokens are left to draw from; None for all.
        top_p: share of the probability that is left, in the likeliest tokens that together have it (Holtzman et al.,
            2020, "The Curious Case of Neural Text Degeneration").
        seed: of the first sequence; the ones after it have the numbers that follow, so that each is drawn the same
            whatever is drawn beside it.

    Raises:
        InputError: a value out of its range.
    """

    def __init__(
        self, temperature: float = 0.8, top_k: int | None = None, top_p: float = 1.0, seed: int = 0, batch_size: int = 1
    ) -> None:
        check(0 <= temperature < math.inf, f"temperature={temperature} must be at least 0 and finite")
        check(top_k is None or top_k >= 1, f"top_k={top_k} must be at least 1")
        check(0 < top_p <= 1, f"top_p={top_p} must be above 0 and at most 1")
        check(0 <= seed < 2**63, f"seed={seed} must be at least 0 and below 2**63")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._generators = [torch.Generator().manual_seed(seed + row) for row in range(batch_size)]

    def __call__(self, logits: Tensor) -> Tensor:
        """Tokens (B,) from logits (B, V), on their device."""
        if self.temperature == 0:
            return logits.argmax(-1)
        cumulated = self.probabilities(logits).cumsum(-1)
        drawn = 1 - torch.cat([torch.rand(1, generator=generator) for generator in self._generators])  # in (0, 1]
        return torch.searchsorted(cumulated, drawn.to(logits.device)[:, None] * cumulated[:, -1:])[:, 0]

    def probabilities(self, logits: Tensor) -> Tensor:
        """What is drawn from, (B, V), for a temperature above 0; its sum is the share that `top_p` leaves."""
        logits = (logits.float() - logits.amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -math.inf)
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(-1, descending=True)
            likelier = ordered.cumsum(-1) - ordered
            probabilities = probabilities.scatter(-1, order, ordered.masked_fill(likelier >= self.top_p, 0.0))
        return probabilities

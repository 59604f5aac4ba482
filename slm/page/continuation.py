"""Text that a model goes on with, one token after another, from any place of what it has written."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from slm.model.sampling import Sampler, decode
from slm.page.checkpoints import Checkpoint

ALTERNATIVES = 10


class Settings(NamedTuple):
    """How a token is drawn; see `slm.model.sampling.Sampler`."""

    temperature: float
    top_k: int | None
    top_p: float


@dataclass(frozen=True)
class Choice:
    """A token that was written.

    Attributes:
        token: its id.
        alternatives: the likeliest tokens there, each with the model's probability and with the one that was drawn
            from; `token` is one of them.
    """

    token: int
    alternatives: dict[int, tuple[float, float]]


@dataclass(frozen=True)
class Place:
    """Where a text is gone on with: all that the next token depends on beside the settings."""

    prompt: tuple[int, ...]
    written: tuple[int, ...]
    seed: int


def drawn_from(checkpoint: Checkpoint, sampler: Sampler, logits: Tensor) -> Tensor:
    """The probabilities (V,) that the next token is drawn with, of logits (V,).

    Only the tokens that the tokenizer has are drawn; the network may have more.
    """
    probabilities = sampler.probabilities(logits[None, : checkpoint.tokenizer.vocab_size])[0]
    unused = probabilities.new_zeros(len(logits) - len(probabilities))
    return torch.cat([probabilities / probabilities.sum(), unused])


class Continuation:
    """Writes; not to be asked by two threads at once.

    The same place always has the same token with the same settings, however one has come there: where a text is gone
    on with elsewhere than it was left, it is read again. What a network holds of a text that is longer than its context
    depends on how that came to be, so it is written again there, with the same tokens.

    Args:
        checkpoint: whose model writes.
        check: is called before each token, and raises where it is no longer wanted.
    """

    def __init__(self, checkpoint: Checkpoint, check: Callable[[], None]) -> None:
        self._checkpoint, self._check = checkpoint, check
        self._steps: Iterator[Tensor] | None = None
        self._at: Place | None = None

    def next(self, place: Place, settings: Settings) -> Choice:
        """The token that the model writes at a place; raises InputError where the logits are not finite."""
        steps = self._steps if self._at == place else None
        self._settings, self._steps, self._at = settings, None, None  # until it is written
        steps = steps or self._go_to(place)
        token = int(next(steps))
        self._steps, self._at = steps, replace(place, written=(*place.written, token))
        return self._choice

    def _go_to(self, place: Place) -> Iterator[Tensor]:
        self._sampler = Sampler(seed=place.seed)
        transformer = self._checkpoint.model.transformer
        device = transformer.output_weight.device
        fits = len(place.prompt) + len(place.written) <= transformer.max_seq_len
        ids = [*place.prompt, *place.written] if fits else place.prompt
        for _ in place.written:
            self._draw_in_vain(device)
        self._forced = [] if fits else list(reversed(place.written))
        steps = decode(transformer, torch.tensor([ids], device=device), self._choose)
        while self._forced:
            next(steps)
        return steps

    def _draw_in_vain(self, device: torch.device) -> None:
        """Let each place have a random number of its own, whatever its token was chosen by."""
        self._sampler.temperature, self._sampler.top_k, self._sampler.top_p = 1.0, None, 1.0
        self._sampler(torch.zeros(1, self._checkpoint.tokenizer.vocab_size, device=device))

    def _choose(self, logits: Tensor) -> Tensor:
        self._check()
        if self._forced:
            return torch.tensor([self._forced.pop()], device=logits.device)
        sampler = self._sampler
        if self._settings.temperature == 0:
            self._draw_in_vain(logits.device)
        sampler.temperature, sampler.top_k, sampler.top_p = self._settings
        logits = logits.float()
        chosen = sampler(logits[:, : self._checkpoint.tokenizer.vocab_size])
        own, drawn = logits.softmax(-1)[0], drawn_from(self._checkpoint, sampler, logits[0])
        likeliest = own.topk(min(ALTERNATIVES, len(own))).indices.tolist()
        token = int(chosen)
        shown = likeliest if token in likeliest else [*likeliest[:-1], token]
        self._choice = Choice(token, {id: (own[id].item(), drawn[id].item()) for id in shown})
        return chosen

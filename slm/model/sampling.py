"""Tokens out of a trained network, one after another.

B batch, T time, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.errors import check
from slm.model.transformer import Transformer

_Module = TypeVar("_Module", bound=nn.Module)

SINKS = 4
"""The first tokens of a sequence, which are never forgotten."""
SMALLEST_TEMPERATURE = 1e-30
"""Logits divided by less may no longer be finite; divided by this, the likeliest token has all of the probability."""
NUMBERS_AT_ONCE = 64
FEW_SEQUENCES, LARGEST_COPY = 16, 2**26
"""Up to so many sequences, and elements of the output layer, a CPU writes with a copy of that layer by columns."""


@torch.inference_mode()
def decode(transformer: Transformer, tokens: Tensor, choose: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """The tokens (B,) that go on from tokens (B, T) of at least one position, one after another, without end.

    The network reads the last `max_seq_len` tokens of the beginning. When the sequence grows longer than that, rotary
    positions let the caches forget an eighth of it: the oldest tokens but for the first four, which networks learn to
    attend to where nothing else matters (Xiao et al., 2023, "Efficient Streaming Language Models with Attention
    Sinks"). No token is read again. Learned positions end there: the last half is read again from position 0, so each
    token is read at most twice.

    Args:
        transformer: the network.
        tokens: int64, on its device.
        choose: the next token (B,) of each sequence, from logits (B, V).
    """
    longest = transformer.max_seq_len
    window = unseen = tokens[:, -longest:]
    network, caches = without_call_overhead(transformer), transformer.new_caches()
    if is_faster_by_columns(transformer, tokens):
        lay_out_by_columns(network)
    while True:
        hidden = network(unseen, caches)[:, -1]  # (B, D)
        chosen = choose(network.logits(hidden))
        yield chosen
        unseen = chosen[:, None]
        window = torch.cat([window, unseen], dim=1)
        if window.shape[1] <= longest:
            continue
        if transformer.rotary is None:
            window = unseen = window[:, -max(1, longest // 2) :]
            caches = transformer.new_caches()
        else:
            num_forgotten = max(1, longest // 8)
            first = min(SINKS, longest - num_forgotten)
            window = torch.cat([window[:, :first], window[:, first + num_forgotten :]], dim=1)
            for cache in caches:
                cache.forget(first, num_forgotten, transformer.rotary)


def without_call_overhead(module: _Module) -> _Module:
    """A twin of a module in eval mode, with the same weights, whose calls cost nothing but its `forward`.

    Calling an `nn.Module` looks for hooks, and reading its weights goes through `__getattr__`: with one sequence of a
    small network that takes as long as the arithmetic. The twin is of a subclass whose `__call__` is `forward`, and
    holds weights and children as plain attributes.
    """
    kind: type[Any] = type(module)
    twin: Any = object.__new__(_twin_class(kind))  # type: ignore[arg-type]
    children = {
        name: None if child is None else without_call_overhead(child) for name, child in module._modules.items()
    }
    tensors = {**module._parameters, **module._buffers}
    twin.__dict__ = {**module.__dict__, **tensors, **children, "_modules": children, "training": False}
    return cast(_Module, twin)


def is_faster_by_columns(transformer: Transformer, tokens: Tensor) -> bool:
    """Whether `lay_out_by_columns` makes writing after tokens (B, T) faster, with a copy of a moderate size."""
    weight = transformer.output_weight
    kind = type(transformer)
    is_ours = kind.output_weight is Transformer.output_weight and kind.logits is Transformer.logits
    return is_ours and weight.device.type == "cpu" and len(tokens) <= FEW_SEQUENCES and weight.numel() <= LARGEST_COPY


def lay_out_by_columns(twin: Transformer) -> None:
    """Give a network without call overhead a copy of its output layer's weight (V, D), in which columns are contiguous.

    So a product with few rows is faster. Of the default model it makes the writing of 1, 4 and 16 sequences 1.05 to
    1.31, 1.48 and 1.22 times as fast on two cores of an Intel Xeon with AVX512, 1.07 to 1.21, 1.07 to 1.15 and 1.09 to
    1.14 times on two of an AMD EPYC with AVX2, in turns; that of 64 no faster beyond the noise.
    """
    by_columns = twin.output_weight.detach().T.contiguous().T
    twin.__dict__["output"] = SimpleNamespace(weight=by_columns)


@functools.cache
def _twin_class(kind: type[Any]) -> Any:
    return type(kind.__name__, (kind,), {"__call__": kind.forward})


class Sampler:
    """Chooses the next token of each sequence: the likeliest at a temperature of 0, else one is drawn.

    Args:
        temperature: what the logits are divided by.
        top_k: how many of the likeliest tokens are left to draw from, and those as likely as the last; None for all.
        top_p: share of the probability that is left, in the likeliest tokens that together have it (Holtzman et al.,
            2020, "The Curious Case of Neural Text Degeneration").
        seed: of the first sequence; the others have the numbers that follow, so that what is drawn for one does not
            depend on those beside it.

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
        self._seeds = range(seed, seed + batch_size)
        self._draw: Callable[[Tensor], Tensor] | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Tokens (B,) from logits (B, V), on their device; raises InputError where these are not finite."""
        assert len(logits) == len(self._seeds)
        if self.temperature == 0:
            likeliest = logits.max(-1)
            _check_finite(likeliest.values.float())
            return likeliest.indices
        if self._draw is None:
            generators = [torch.Generator(logits.device).manual_seed(seed) for seed in self._seeds]
            self._draw = SumsOfProbabilities(generators) if logits.device.type == "cpu" else Race(generators)
        return self._draw(self.probabilities(logits))

    def probabilities(self, logits: Tensor) -> Tensor:
        """What is drawn from, (B, V); its sum is the share that `top_p` leaves."""
        logits = logits.float()
        if self.temperature == 0:
            return F.one_hot(logits.max(-1).indices, logits.shape[-1]).float()
        if self.temperature != 1:
            logits = logits / max(self.temperature, SMALLEST_TEMPERATURE)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -math.inf)
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(-1, descending=True)
            likelier = ordered.cumsum(-1) - ordered
            probabilities = probabilities.scatter(-1, order, ordered.masked_fill(likelier >= self.top_p, 0.0))
        return probabilities


class SumsOfProbabilities:
    """Draws tokens (B,) with probabilities (B, V), by one random number each.

    Not for a GPU, whose running sums differ from call to call and may even fall.

    Args:
        generators: one for each sequence.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._numbers = self._random_numbers(generators)

    def __call__(self, probabilities: Tensor) -> Tensor:
        cumulated = probabilities.cumsum(-1)
        total = cumulated[:, -1:]
        _check_finite(total)
        return torch.searchsorted(cumulated, next(self._numbers) * total)[:, 0]

    def _random_numbers(self, generators: Sequence[torch.Generator]) -> Iterator[Tensor]:
        """Columns (B, 1) in (0, 1], of which many are drawn at once: calls take longer than numbers."""
        while True:
            drawn = [torch.rand(NUMBERS_AT_ONCE, generator=generator) for generator in generators]
            yield from (1 - torch.stack(drawn, dim=1))[:, :, None].unbind()


class Race:
    """Draws the same without running sums: of exponential times over probabilities, the shortest is drawn that often.

    Args:
        generators: one for each sequence.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = generators

    def __call__(self, probabilities: Tensor) -> Tensor:
        _check_finite(probabilities)
        times = torch.empty_like(probabilities)
        for row, generator in zip(times, self._generators, strict=True):
            row.exponential_(generator=generator)
        return (probabilities / times).argmax(-1)


def _check_finite(values: Tensor) -> None:
    is_finite = math.isfinite(values.sum().item())
    check(is_finite, "the model's logits are not finite: take a checkpoint from before it diverged")

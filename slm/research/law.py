"""A scaling law: L = E + A / N^a + B / D^b, the loss of a model of N parameters after D tokens, each seen once.

Hoffmann et al., 2022, "Training Compute-Optimal Large Language Models", whose third approach this is. E, in nats per
token, is what no model gets below: on text nobody knows it, on the default data it is `MarkovSource.entropy_rate`.

P points, R resamplings of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slm.errors import check

EXPONENTS = torch.linspace(0.05, 2.0, 40, dtype=torch.float64)
ZOOMS = 7
FEWEST = 6
"""Points that are needed to fit five numbers."""
NUM_RESAMPLINGS = 400
FLOPS_PER_WEIGHT = 6
"""And token: a multiplication and an addition forward, twice as many backward."""


@dataclass(frozen=True)
class Law:
    """Its five numbers, and what a model is expected to reach."""

    irreducible: float
    of_parameters: float
    of_tokens: float
    parameters_exponent: float
    tokens_exponent: float

    def loss(self, parameters: float, tokens: float) -> float:
        """L(N, D)."""
        from_size = self.of_parameters / parameters**self.parameters_exponent
        return self.irreducible + from_size + self.of_tokens / tokens**self.tokens_exponent

    def best_parameters(self, flops: float) -> float:
        """The N that reaches the lowest loss where 6 N D is so many floating-point operations."""
        a, b = self.parameters_exponent, self.tokens_exponent
        ratio = a * self.of_parameters / (b * self.of_tokens)
        return float(ratio ** (1 / (a + b)) * (flops / FLOPS_PER_WEIGHT) ** (b / (a + b)))


@dataclass(frozen=True)
class Fit:
    """A law, and how far what it rests on determines it.

    Attributes:
        law: that fits all points best.
        resampled: those that fit as many points drawn from them with replacement.
    """

    law: Law
    resampled: Sequence[Law]

    def interval(self, value_of: Callable[[Law], float]) -> tuple[float, float]:
        """Between which two a value lies in 90 % of the resampled laws."""
        values = torch.tensor([value_of(law) for law in self.resampled], dtype=torch.float64)
        low, high = values.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
        return low, high


def fit(parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float], seed: int = 0) -> Fit:
    """The law with the least squares of relative errors, and those of resampled points.

    For given exponents E, A and B are a linear problem, so the exponents alone are looked for, in a grid that narrows:
    there is no starting point that the result could depend on.

    Args:
        parameters: N of each point.
        tokens: D of each.
        losses: what each reached, in nats per token.
        seed: of the resampling.

    Raises:
        InputError: points too few, or too much alike, to tell the two terms apart.
    """
    check(len(losses) >= FEWEST, f"{len(losses)} points are too few: a law has five numbers, give at least {FEWEST}")
    for name, values in (("sizes", parameters), ("numbers of tokens", tokens)):
        check(len(set(values)) >= 3, f"{len(set(values))} {name} are too few to see a law in them: give at least 3")
    n, d, loss = (torch.tensor(values, dtype=torch.float64) for values in (parameters, tokens, losses))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(loss), (NUM_RESAMPLINGS, len(loss)), generator=generator)
    counts = torch.zeros(NUM_RESAMPLINGS, len(loss), dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    laws = _laws(n, d, loss, torch.ones(1, len(loss), dtype=torch.float64))
    check(bool(laws), "no law with positive numbers fits these points: they are too much alike")
    return Fit(laws[0], _laws(n, d, loss, counts))


def _laws(n: Tensor, d: Tensor, loss: Tensor, counts: Tensor) -> list[Law]:
    """The best law for each row of counts (R, P) of the points n, d and loss (P,), where there is one."""
    a = b = EXPONENTS.expand(len(counts), -1)  # (R, G)
    for _ in range(ZOOMS):
        best, numbers = _best_of_grid(n, d, loss, counts, a, b)
        step_a, step_b = (axis[:, 1:2] - axis[:, :1] for axis in (a, b))
        around = torch.linspace(-1, 1, 9, dtype=torch.float64)
        chosen_a, chosen_b = best[:, :1], best[:, 1:]
        a, b = ((chosen + step * around).clamp(1e-3) for chosen, step in ((chosen_a, step_a), (chosen_b, step_b)))
    return [Law(*row.tolist()) for row in torch.cat([numbers, best], dim=1) if row.isfinite().all()]


def _best_of_grid(n: Tensor, d: Tensor, loss: Tensor, counts: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The best exponents (R, 2) of the grids a (R, G) and b (R, G), and E, A and B (R, 3) beside them."""
    best = torch.full((len(counts),), math.inf, dtype=torch.float64)
    exponents, numbers = torch.zeros(len(counts), 2, dtype=torch.float64), torch.zeros(len(counts), 3).double()
    root = counts.sqrt()  # (R, P)
    for column in range(a.shape[1]):
        # columns of 1, (N / mean)^-a and (D / mean)^-b over L, whose sizes do not differ by many powers of ten
        one = (1 / loss).expand(len(counts), b.shape[1], -1)  # (R, G, P)
        from_n = ((n / n.mean()) ** -a[:, column, None] / loss)[:, None].expand_as(one)
        from_d = (d / d.mean()) ** -b[:, :, None] / loss
        x = torch.stack([one, from_n, from_d], dim=-1) * root[:, None, :, None]  # (R, G, P, 3)
        y = root[:, None, :, None].expand(-1, b.shape[1], -1, -1)
        gram, right = x.mT @ x, x.mT @ y
        solution = torch.linalg.solve_ex(gram, right).result  # (R, G, 3, 1)
        errors = (x @ solution - y).square().sum((-1, -2))
        errors = errors.masked_fill((solution < 0).any(-2)[..., 0] | ~errors.isfinite(), math.inf)
        lowest, at = errors.min(-1)
        is_better = lowest < best
        best = torch.where(is_better, lowest, best)
        rows = torch.arange(len(counts))
        found = torch.stack([a[:, column], b[rows, at]], dim=-1)
        scale = torch.stack([torch.ones_like(found[:, 0]), n.mean() ** found[:, 0], d.mean() ** found[:, 1]], dim=-1)
        exponents = torch.where(is_better[:, None], found, exponents)
        numbers = torch.where(is_better[:, None], solution[rows, at, :, 0] * scale, numbers)
    return exponents, numbers.masked_fill(~best.isfinite()[:, None], math.nan)

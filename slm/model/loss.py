"""Cross-entropy straight from the hidden states, without paying for the whole logits tensor.

N positions, D embedding, V vocabulary, R rows of a chunk.

The logits (N, V) are the largest tensor of a small model by far. Here they exist a chunk of rows at a time, in a buffer
of bounded size, which on a CPU stays in its cache. The gradients of a chunk are computed beside its loss, while it is
there, so that nothing of size V is kept for the backward pass but the gradient of the weight.

Measured at 4096 x 128 x 10,000 on two CPU cores with AVX512-bf16 (torch 2.13), forward and backward: whole logits in
bf16 76 ms, here 57, of which 42 are the three matrix products; in 32 bits with AVX2 190, 183 and 162. Chunks of 500
rows take 3 % longer than all rows at once. On CUDA and MPS chunks are larger, often one for all rows, with a vocabulary
padded to what their matrix units take whole, probabilities instead of exponentials, and nothing that the program waits
for: chosen by reasoning, not by measurement.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 8 * 2**20
CHUNK_ELEMENTS_ON_A_GPU = 2**27
"""Size R x V of the buffer. R is never less than D: with a large vocabulary it is larger.

Each chunk adds to the whole gradient of the weight, so fewer rows cost more than they save: with a vocabulary of
128,000 the output layer took 2.0 times as long in chunks of 40 rows as in chunks of 512, 1.3 times in chunks of 128.
"""
LARGEST_CHUNK = 8192
"""Most rows of a chunk: the gradient of the weight sums one term a row, and in float16 must stay below 65,504."""
LARGEST_SMALL_LOGIT = 60.0
"""Up to which exponentials are taken as they are: V of them, times weights, stay far below the largest number, e^88."""
COLUMNS_OF_A_PIECE = 100
COLUMNS_ON_A_GPU = 64
"""On a GPU the vocabulary is padded to a multiple of this, so that every row of the logits is well aligned."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of the logits `hidden @ weight.T`; differentiable once, in hidden and weight.

    Equal to `F.cross_entropy(F.linear(hidden, weight).float(), targets)`. Under autocast the matrix products run in its
    type, on probabilities or exponentials rounded to it; gradients of the weight are added up in at least 32 bits, and
    scaled last, so that a gradient scaler keeps small ones.

    Args:
        hidden: (N, D).
        weight: (V, D).
        targets: (N,), int64, in [0, V).
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, _compute_dtype(hidden))  # type: ignore[no-untyped-call]


@torch.no_grad()
def sum_and_correct(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies, in nats, and how often the greatest logit is the target's, in one pass.

    Args:
        hidden: (N, D).
        weight: (V, D).
        targets: (N,), int64, in [0, V).
    """
    dtype = _compute_dtype(hidden)
    loss = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    vocab_size = len(weight)
    with torch.autocast(hidden.device.type, enabled=False):
        hidden, weight = hidden.to(dtype), _padded(weight.to(dtype))
        for rows in _chunks(hidden, weight):
            logits = (hidden[rows] @ weight.T)[:, :vocab_size]  # (R, V)
            loss += F.cross_entropy(logits.to(loss.dtype), targets[rows], reduction="sum")
            correct += (logits.argmax(-1) == targets[rows]).sum()
    return loss, correct


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            h, w = hidden.to(dtype), _padded(weight.to(dtype))
            grad_hidden = torch.empty_like(h)
            grad_weight = torch.zeros_like(w, dtype=torch.promote_types(dtype, torch.float32))
            loss = torch.zeros((), dtype=grad_weight.dtype, device=h.device)
            part = torch.empty_like(w) if dtype != grad_weight.dtype else None
            chunks = list(_chunks(h, w))
            logits = h.new_empty(len(h[chunks[0]]), len(w))  # (R, V)
            of_logits = _from_exponentials if _has_small_logits(h, w) else _from_probabilities
            for rows in chunks:
                x, t = h[rows], targets[rows]
                s = torch.mm(x, w.T, out=logits[: len(x)])
                s[:, len(weight) :] = -math.inf
                losses, grad_logits, total = of_logits(s, t)
                loss += losses.sum()
                torch.mm(grad_logits, w, out=grad_hidden[rows])
                if total is not None:
                    grad_hidden[rows] /= total
                    x = (x / total).to(dtype)
                if part is None:
                    grad_weight.addmm_(grad_logits.T, x)
                else:
                    grad_weight += torch.mm(grad_logits.T, x, out=part)
        ctx.save_for_backward(grad_hidden, grad_weight[: len(weight)])
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss / len(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale, (hidden_dtype, weight_dtype) = grad / len(grad_hidden), ctx.dtypes
        return (
            (grad_hidden.to(scale.dtype) * scale).to(hidden_dtype),
            (grad_weight * scale).to(weight_dtype),
            None,
            None,
        )


def _from_exponentials(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The losses (R,), and the gradient of the logits as (R, V), which takes their place, and what divides it, (R, 1).

    For small logits, whose exponentials need neither the largest of a row subtracted nor their sum divided by: that is
    left to the smaller tensors that the gradient is multiplied by.
    """
    rows = torch.arange(len(targets))
    target = logits[rows, targets].to(torch.promote_types(logits.dtype, torch.float32))
    exponentials = logits.exp_()
    exponentials[rows, targets] = 0.0
    others = _sum_of_rows(exponentials)  # so that a small loss keeps all its bits: it is log(1 + others / exp(target))
    exponentials[rows, targets] = -others.to(logits.dtype)
    return F.softplus(others.log() - target, threshold=40), exponentials, (others + target.exp())[:, None]


def _from_probabilities(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, None]:
    """The losses (R,) and the gradient of the logits (R, V): p - 1 at the target, and p elsewhere."""
    exact = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    rows = torch.arange(len(targets), device=targets.device)
    losses = -exact[rows, targets]
    probabilities = exact.exp_().to(logits.dtype)
    probabilities[rows, targets] = torch.expm1(-losses).to(logits.dtype)  # p - 1, unrounded
    return losses, probabilities, None


def _has_small_logits(hidden: Tensor, weight: Tensor) -> bool:
    """Whether no exponential of a logit, nor the sum of a row of them, can overflow; false on a GPU.

    By the inequality of Cauchy and Schwarz. A GPU would have to be waited for to know, and float16 holds no exponential
    above 11.
    """
    if not _is_on_cpu(hidden) or hidden.dtype == torch.float16:
        return False
    exact = torch.promote_types(hidden.dtype, torch.float32)
    longest = [torch.linalg.vector_norm(x, dim=-1, dtype=exact).max() for x in (hidden, weight)]
    return bool(longest[0] * longest[1] <= LARGEST_SMALL_LOGIT)


def _sum_of_rows(x: Tensor) -> Tensor:
    """(R, V) to (R,), in at least 32 bits. Those of 16 are summed in pieces, without a copy of them all in 32 bits.

    The sum of a piece is rounded to 16 bits, which is less than what the rounding of the logits themselves brings.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    if x.dtype == exact:
        return x.sum(-1)
    whole = x.shape[1] // COLUMNS_OF_A_PIECE * COLUMNS_OF_A_PIECE
    pieces = torch.unflatten(x[:, :whole], 1, (-1, COLUMNS_OF_A_PIECE)).sum(-1)
    return pieces.sum(-1, dtype=exact) + x[:, whole:].sum(-1, dtype=exact)


def _padded(weight: Tensor) -> Tensor:
    """On a GPU, the weight with rows of zeros up to the next multiple of COLUMNS_ON_A_GPU."""
    missing = 0 if _is_on_cpu(weight) else -len(weight) % COLUMNS_ON_A_GPU
    return F.pad(weight, (0, 0, 0, missing)) if missing else weight


def _is_on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    elements = CHUNK_ELEMENTS if _is_on_cpu(hidden) else CHUNK_ELEMENTS_ON_A_GPU
    num_rows = min(len(hidden), max(elements // len(weight), weight.shape[1]), LARGEST_CHUNK)
    for first in range(0, len(hidden), num_rows):
        yield slice(first, first + num_rows)

"""The functions of the network without weights, each in the fastest way a device has.

B batch, T time, S time so far, D embedding, H heads of queries, K heads of keys and values, C any number.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PLAIN_UP_TO = 256
PLAIN_UP_TO_IN_32_BITS = 128
"""Up to so many positions a CPU computes attention faster as written than by torch's fused kernel.

The second is for float32 without dropout. Milliseconds of forward and backward, 4,096 tokens, as written and by the
kernel, on two cores of one processor (torch 2.13), which is kept to AVX2 for the last two columns:

| positions | AVX512-bf16, bf16, 4 heads of 32 | AVX2, float32, 8 heads of 32 | the same with dropout |
|---|---|---|---|
| 64 | 2.4, 18 | 10, 15 | 13, 23 |
| 128 | 3.9, 22 | 15, 23 | 21, 39 |
| 256 | 6.2, 19 | 28, 33 | 45, 78 |
| 1,024 | 24, 31 | 107, 78 | 177, 310 |

At 256 positions an older processor with AVX2 took 36 by the kernel, and twice as long as written. Beyond 256 the scores
(B, H, T, T) would also take more memory than all the rest.
"""

GELU_SLOPE, GELU_CUBE = math.sqrt(8 / math.pi), 0.044715


def drop(x: Tensor, p: float) -> Tensor:
    """Each value 0 with probability p, else divided by 1 - p (Srivastava et al., 2014).

    On a CPU each value takes 16 random bits, to which p is rounded. That is three times as fast as torch's dropout,
    whose random numbers would take half of a training step.
    """
    if p == 0.0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    dropped = min(round(p * 2**16), 2**16 - 1)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return x * (kept.to(x.dtype) * (2**16 / (2**16 - dropped)))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Softmax of the scaled scores, times v, (B, H, T, D / H): each position attends to itself and those before it.

    With fewer heads of keys and values than of queries, each serves the next H / K of these, which then take the place
    of further positions that look at the same keys: no key is copied.

    Args:
        q: (B, H, T, D / H), of the last T positions.
        k: (B, K, S, D / H), of all S positions; v likewise.
        dropout: probability of dropping a weight.
    """
    seq_len, all_len, group_size = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if seq_len < all_len:
        mask = None if seq_len == 1 else causal_mask(seq_len, all_len, q.device).repeat(group_size, 1)
        return F.scaled_dot_product_attention(_grouped(q, k), k, v, mask, dropout_p=dropout).reshape(q.shape)
    longest = PLAIN_UP_TO_IN_32_BITS if q.dtype == torch.float32 and dropout == 0 else PLAIN_UP_TO
    if q.device.type != "cpu" or seq_len > longest:
        is_grouped = group_size > 1
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=is_grouped)
    weights = drop(causal_weights(q, k), dropout)
    return (_grouped(weights, k) @ v).reshape(q.shape)


def causal_weights(q: Tensor, k: Tensor) -> Tensor:
    """How much each of the last T positions attends to each of all S up to it, (B, H, T, S).

    Args:
        q: (B, H, T, D / H).
        k: (B, K, S, D / H).
    """
    seq_len, all_len, group_size = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    future = torch.full((seq_len, all_len), -math.inf, dtype=q.dtype, device=q.device).triu(1 + all_len - seq_len)
    queries, keys = _grouped(q, k).flatten(0, 1), k.flatten(0, 1)  # (BK, T H / K, D / H), (BK, S, D / H)
    scores = torch.baddbmm(future.repeat(group_size, 1), queries, keys.mT, alpha=q.shape[-1] ** -0.5)
    return scores.softmax(-1).view(*q.shape[:3], all_len)


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """What each head of queries has, (B, H, T, C), as further rows for its head of keys, (B, K, T H / K, C)."""
    return x.reshape(len(x), k.shape[1], -1, x.shape[-1])


def causal_mask(seq_len: int, all_len: int, device: torch.device) -> Tensor:
    """Which of all S positions each of the last T attends to, (T, S), where a cache holds the others."""
    return torch.ones(seq_len, all_len, dtype=torch.bool, device=device).tril(all_len - seq_len)


def gelu(x: Tensor) -> Tensor:
    """GPT-2's tanh approximation of GELU (Hendrycks and Gimpel, 2016).

    With 1 + tanh u written as 2 sigmoid(2u), whose exponential is cheaper: forward and backward, 4096 x 512 values take
    1.8 ms so in bf16 on two cores with AVX512-bf16, and 2.8 with torch's own; 3.0 and 5.0 in 32 bits with AVX2.
    """
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(x * (GELU_SLOPE + GELU_SLOPE * GELU_CUBE * x**2))
    if x.device.type != "cpu" or not torch.is_grad_enabled():
        return F.gelu(x, approximate="tanh")
    return _Gelu.apply(x)  # type: ignore[no-untyped-call]


class _Gelu(torch.autograd.Function):
    """x s, where s = sigmoid(x q) and q = a + a c x^2; its derivative is s + s (1 - s) x (a + 3 a c x^2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        slope = x.new_full((), GELU_SLOPE)
        s = torch.addcmul(slope, x, x, value=GELU_SLOPE * GELU_CUBE).mul_(x).sigmoid_()
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, s = ctx.saved_tensors
        slope = x.new_full((), GELU_SLOPE)
        u = torch.addcmul(slope, x, x, value=3 * GELU_SLOPE * GELU_CUBE).mul_(x)
        return torch.addcmul(s, torch.addcmul(s, s, s, value=-1), u).mul_(grad)

"""The functions of the network without weights, each in the fastest way a device has.

B batch, T time, S time so far, D embedding, H heads of queries, K heads of keys and values, C any number.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN_UP_TO = 256
PLAIN_UP_TO_IN_32_BITS = 64
"""Up to so many positions a CPU computes attention faster as written than by torch's fused kernel.

The second is for float32 without dropout. Milliseconds of forward and backward, 4,096 tokens, as written and by the
kernel, on two cores (torch 2.13):

| positions | AVX512-bf16, bf16, 4 heads of 32 | AVX2, float32, 8 heads of 32 | the same with dropout |
|---|---|---|---|
| 64 | | 14, 15 | 20, 37 |
| 128 | 10, 26 | 25, 23 | 43, 76 |
| 256 | 14, 23 | 75, 36 | 119, 171 |
| 1,024 | 82, 39 | | |

Beyond 256 the scores (B, H, T, T) would also take more memory than all the rest.
"""


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
    """How much each position attends to each up to it, (B, H, T, T), of q (B, H, T, D / H) and k (B, K, T, D / H)."""
    seq_len = q.shape[2]
    scores = _grouped(q * q.shape[-1] ** -0.5, k) @ k.transpose(-2, -1)
    future = torch.full((seq_len, seq_len), -math.inf, dtype=scores.dtype, device=scores.device).triu(1)
    return (scores.view(*q.shape[:3], seq_len) + future).softmax(-1)


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """What each head of queries has, (B, H, T, C), as further rows for its head of keys, (B, K, T H / K, C)."""
    return x.reshape(len(x), k.shape[1], -1, x.shape[-1])


def causal_mask(seq_len: int, all_len: int, device: torch.device) -> Tensor:
    """Which of all S positions each of the last T attends to, (T, S), where a cache holds the others."""
    return torch.ones(seq_len, all_len, dtype=torch.bool, device=device).tril(all_len - seq_len)


def gelu(x: Tensor) -> Tensor:
    """GPT-2's tanh approximation of GELU (Hendrycks and Gimpel, 2016).

    Compiled, with 1 + tanh u written as 2 sigmoid(2u), whose exponential is cheaper: on two cores with AVX512-bf16 the
    compiled layers of the default model take 27.6 ms so, forward and backward, and 30.7 with tanh.
    """
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return F.gelu(x, approximate="tanh")

"""Tokens (B, T) in, hidden states (B, T, D) out: the decoder of GPT-2, pre-norm, with a tied output layer.

B batch, T time, S time so far, D embedding, H heads, F feed-forward hidden, V vocabulary.

The mathematics is that of GPT-2 (Radford et al., 2019, "Language Models are Unsupervised Multitask Learners"), so its
weights fit one to one.
"""

import math
from collections.abc import Sequence
from itertools import repeat
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.errors import InputError, check

PLAIN_UP_TO = 256
PLAIN_UP_TO_IN_32_BITS = 64
"""Longest sequence for which a CPU computes attention as it is written, with torch's fused kernel being slower.

The second is for float32 without dropout, where the kernel is faster sooner. Measured on two cores, 4,096 tokens,
forward and backward in ms, as written against the kernel. With AVX512-bf16 (torch 2.13), 4 heads of 32, in bf16: 10 and
26 at 128, 14 and 23 at 256, 82 and 39 at 1,024. With AVX2 alone, 8 heads of 32, in float32: 14 and 15 at 64, 25 and 23
at 128, 75 and 36 at 256; with dropout 20 and 37, 43 and 76, 119 and 171. Beyond 256 the scores (B, H, T, T) would also
take more memory than all the rest.
"""


class Dropout(nn.Module):
    """`drop` while training, nothing in eval mode."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p if self.training else 0.0)


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


class ResidualLinear(nn.Linear):
    """A linear layer whose output is added to the residual stream: GPT-2 initializes it with smaller weights."""


class KVCache:
    """The keys and values of one layer for the tokens that it has seen, so that each is computed once.

    Args:
        capacity: how many tokens it can hold.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.k = self.v = torch.empty(0)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of the next tokens, (B, H, T, D / H); returns those of all tokens so far, (B, H, S, D / H)."""
        if self.length == 0:
            batch_size, num_heads, _, head_dim = k.shape
            self.k, self.v = (k.new_empty(batch_size, num_heads, self.capacity, head_dim) for _ in range(2))
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class CausalSelfAttention(nn.Module):
    """Each position attends to itself and to those before it (Vaswani et al., 2017)."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = dropout
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.out = ResidualLinear(embed_dim, embed_dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        q, k, v = self.heads(x, cache.length if cache else 0)
        if cache is not None:
            k, v = cache.update(k, v)
        attended = causal_attention(q, k, v, self.attention_dropout if self.training else 0.0)
        return self.dropout(self.out(attended.transpose(1, 2).flatten(2)))  # (B, T, D)

    def heads(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of every head, (B, H, T, D / H) each.

        Args:
            x: (B, T, D).
            start: the position of the first of the T. It plays no part here, where positions are in x; rotary
                positions, which turn queries and keys, are added by overriding this.
        """
        batch_size, seq_len, _ = x.shape
        heads = self.qkv(x).view(batch_size, seq_len, 3, self.num_heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind()
        return q, k, v


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Softmax of the scaled scores, times v: each position attends to itself and those before it.

    Args:
        q: (B, H, T, D / H), of the last T positions.
        k: (B, H, S, D / H), of all S positions; v likewise.
        dropout: probability of dropping a weight.
    """
    seq_len, all_len = q.shape[-2], k.shape[-2]
    if seq_len < all_len:
        mask = None if seq_len == 1 else causal_mask(seq_len, all_len, q.device)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout)
    longest = PLAIN_UP_TO_IN_32_BITS if q.dtype == torch.float32 and dropout == 0 else PLAIN_UP_TO
    if q.device.type != "cpu" or seq_len > longest:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    return drop(causal_weights(q, k), dropout) @ v


def causal_weights(q: Tensor, k: Tensor) -> Tensor:
    """How much each position attends to each one up to it, (B, H, T, T), of q and k (B, H, T, D / H)."""
    seq_len = q.shape[-2]
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    future = torch.full((seq_len, seq_len), -math.inf, dtype=scores.dtype, device=scores.device).triu(1)
    return (scores + future).softmax(-1)


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


class FeedForward(nn.Module):
    """Two linear layers around a GELU, at each position alone."""

    def __init__(self, embed_dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(embed_dim, hidden_dim)
        self.down = ResidualLinear(hidden_dim, embed_dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(gelu(self.up(x))))


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream."""

    def __init__(self, embed_dim: int, num_heads: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(embed_dim)
        self.attn = CausalSelfAttention(embed_dim, num_heads, dropout)
        self.ff_norm = nn.LayerNorm(embed_dim)
        self.ff = FeedForward(embed_dim, hidden_dim, dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cache)
        return x + self.ff(self.ff_norm(x))


class Transformer(nn.Module):
    """A causal Transformer language model.

    Args:
        vocab_size: number of token ids.
        embed_dim: width of the residual stream.
        num_heads: attention heads in a layer; divides embed_dim.
        num_layers: blocks of attention and feed-forward.
        hidden_dim: width of the feed-forward layer.
        max_seq_len: longest sequence, in tokens.
        dropout: probability of dropping a value, in embedding, attention and residual branches.

    Raises:
        InputError: a size below 1, heads that do not divide the embedding, a dropout outside [0, 1).
    """

    changeable_options: ClassVar[frozenset[str]] = frozenset({"dropout"})
    """The options that may change after training; the weights are tied to all others."""

    def __init__(
        self,
        vocab_size: int = 10_000,
        embed_dim: int = 128,
        num_heads: int = 4,
        num_layers: int = 2,
        hidden_dim: int = 512,
        max_seq_len: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {
            "vocab_size": vocab_size,
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "num_layers": num_layers,
            "hidden_dim": hidden_dim,
            "max_seq_len": max_seq_len,
        }
        for name, size in sizes.items():
            check(size >= 1, f"{name}={size} must be at least 1")
        check(
            embed_dim % num_heads == 0,
            f"embed_dim={embed_dim} is not divisible by num_heads={num_heads}: every head takes an equal share",
        )
        check(0.0 <= dropout < 1.0, f"dropout={dropout} must be at least 0 and below 1")

        self.max_seq_len = max_seq_len
        self.token_embedding = nn.Embedding(vocab_size, embed_dim)
        self.position_embedding = nn.Embedding(max_seq_len, embed_dim)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, hidden_dim, dropout) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's initialization: N(0, 0.02), what is added to the residual stream smaller, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                is_residual = isinstance(module, ResidualLinear)
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * len(self.blocks)) if is_residual else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, caches: Sequence[KVCache] | None = None) -> Tensor:
        """Hidden states (B, T, D) of tokens (B, T).

        Args:
            tokens: int64.
            caches: one for each block; the tokens follow those that the caches have seen.

        Raises:
            InputError: there are more tokens than `max_seq_len`.
        """
        start = caches[0].length if caches else 0
        end = start + tokens.shape[1]
        if end > self.max_seq_len:
            raise InputError(
                f"a sequence of {end} tokens is longer than max_seq_len={self.max_seq_len}: "
                "shorten it, or train a model with a larger max_seq_len"
            )
        x = self.dropout(self.embed(tokens, start))  # (B, T, D)
        for block, cache in zip(self.blocks, caches or repeat(None), strict=False):
            x = block(x, cache)
        return self.final_norm(x)

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """The embedding (B, T, D) of tokens (B, T) and of their positions, of which the first is `start`."""
        positions = self.position_embedding.weight[start : start + tokens.shape[1]]  # (T, D)
        return self.token_embedding(tokens) + positions

    def new_caches(self) -> list[KVCache]:
        """Empty caches for `forward`, in which it keeps the keys and values of the tokens that it has seen."""
        return [KVCache(self.max_seq_len) for _ in self.blocks]

    @property
    def output_weight(self) -> Tensor:
        """The matrix (V, D) of the output layer, tied to the token embedding."""
        return self.token_embedding.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer: hidden states (..., D) to logits (..., V)."""
        return F.linear(hidden, self.output_weight)

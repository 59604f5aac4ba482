"""Tokens (B, T) in, hidden states (B, T, D) out: the decoder of GPT-2, pre-norm, with a tied output layer.

B batch, T time, S time so far, D embedding, H heads, F feed-forward hidden, V vocabulary.

The mathematics is that of GPT-2 (Radford et al., 2019, "Language Models are Unsupervised Multitask Learners"), so its
weights fit one to one.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.errors import InputError, check
from slm.model.functional import causal_attention, drop, gelu


class Dropout(nn.Module):
    """`drop` while training, nothing in eval mode."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p if self.training else 0.0)


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
        q, k, v = self.heads(x, 0 if cache is None else cache.length)
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
    """The options that may change after training; the weights depend on all others."""

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
        of_each_block: Sequence[KVCache | None] = caches or [None] * len(self.blocks)
        for block, cache in zip(self.blocks, of_each_block, strict=True):
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

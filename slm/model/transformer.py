"""Tokens (B, T) in, hidden states (B, T, D) out: a pre-norm decoder, of the family of GPT-2 or of Llama.

B batch, T time, S time so far, D embedding, H heads, K heads of keys and values, F feed-forward hidden, V vocabulary.

The mathematics is that of GPT-2 (Radford et al., 2019, "Language Models are Unsupervised Multitask Learners") or of
Llama (Touvron et al., 2023, "LLaMA: Open and Efficient Foundation Language Models"), so their weights fit one to one.
What the families differ in stands in `GPT2` and `LLAMA`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.errors import InputError, check
from slm.model.functional import causal_attention, drop, gelu

ROPE_THETA = 10_000.0


class Dropout(nn.Module):
    """`drop` while training, nothing in eval mode."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p if self.training else 0.0)


class ResidualLinear(nn.Linear):
    """A linear layer whose output is added to the residual stream: GPT-2 initializes it with smaller weights."""


class RotaryEmbedding(nn.Module):
    """Turns queries and keys by angles that grow with their positions (Su et al., 2021, "RoFormer").

    The product of a query and a key then depends on how far they are apart, not on where they are.

    Args:
        num_positions: how many positions it knows.
        head_dim: values in a query or a key; values i and i + head_dim / 2 are turned together.
        theta: the slowest of these pairs turns by one radian in almost this many positions, the fastest in one.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, num_positions: int, head_dim: int, theta: float) -> None:
        super().__init__()
        speeds = theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.outer(torch.arange(num_positions).float(), speeds)  # (num_positions, D / H / 2)
        self.register_buffer("cos", torch.cat([angles.cos(), angles.cos()], dim=-1), persistent=False)
        self.register_buffer("sin", torch.cat([-angles.sin(), angles.sin()], dim=-1), persistent=False)

    def forward(self, x: Tensor, start: int) -> Tensor:
        """Queries or keys (B, H, T, D / H), of which the first is at position `start`, turned."""
        positions = slice(start, start + x.shape[2])
        cos, sin = self.cos[positions].to(x.dtype), self.sin[positions].to(x.dtype)  # (T, D / H)
        return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin

    def turned_back(self, x: Tensor, by: int) -> Tensor:
        """Queries or keys (B, H, T, D / H), turned to positions that are lower by a number."""
        cos, sin = self.cos[by : by + 1].to(x.dtype), self.sin[by : by + 1].to(x.dtype)  # (1, D / H)
        return x * cos - x.roll(x.shape[-1] // 2, dims=-1) * sin


SMALLEST_ROOM = 256
"""Tokens that a cache has memory for at first, if its capacity allows that."""


class KVCache:
    """The keys and values of one layer for the tokens that it has seen, so that each is computed once.

    Args:
        capacity: the most tokens that it holds; its memory grows with those that it has.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.k = self.v = torch.empty(0, 0, 0, 0)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of the next tokens, (B, K, T, D / H); returns those of all tokens so far, (B, K, S, D / H)."""
        start, self.length = self.length, self.length + k.shape[2]
        if self.length > self.k.shape[2]:
            batch_size, num_kv_heads, _, head_dim = k.shape
            room = min(self.capacity, max(2 * self.length, SMALLEST_ROOM))
            grown = [k.new_empty(batch_size, num_kv_heads, room, head_dim) for _ in range(2)]
            for new, old in zip(grown, (self.k, self.v), strict=True):
                if start:
                    new[:, :, :start] = old[:, :, :start]
            self.k, self.v = grown
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]

    def forget(self, first: int, num_tokens: int, rotary: RotaryEmbedding) -> None:
        """Drop tokens from the position `first` on. Those after them move there, and their keys are turned back."""
        later = slice(first + num_tokens, self.length)
        self.length -= num_tokens
        self.k[:, :, first : self.length] = rotary.turned_back(self.k[:, :, later], num_tokens)
        self.v[:, :, first : self.length] = self.v[:, :, later].clone()


class CausalSelfAttention(nn.Module):
    """Each position attends to itself and to those before it (Vaswani et al., 2017).

    Args:
        embed_dim: D.
        num_heads: H, heads of queries.
        dropout: probability of dropping an attention weight, or a value that is added to the residual stream.
        num_kv_heads: K, heads of keys and values, of which each serves H / K heads of queries (Ainslie et al., 2023,
            "GQA"); None for H.
        bias: whether the linear layers add one.
        rotary: turns queries and keys by their positions; None where positions are in x.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float,
        num_kv_heads: int | None = None,
        bias: bool = True,
        rotary: RotaryEmbedding | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.attention_dropout = dropout
        head_dim = embed_dim // num_heads
        self.qkv = nn.Linear(embed_dim, (self.num_heads + 2 * self.num_kv_heads) * head_dim, bias)
        self.out = ResidualLinear(embed_dim, embed_dim, bias)
        self.dropout = Dropout(dropout)
        self.rotary = rotary

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        q, k, v = self.heads(x, 0 if cache is None else cache.length)
        if cache is not None:
            k, v = cache.update(k, v)
        attended = causal_attention(q, k, v, self.attention_dropout if self.training else 0.0)
        return self.dropout(self.out(attended.transpose(1, 2).flatten(2)))  # (B, T, D)

    def heads(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, D / H), keys and values (B, K, T, D / H) of every head.

        Args:
            x: (B, T, D).
            start: the position of the first of the T, by which rotary queries and keys are turned.
        """
        sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        q, k, v = self.qkv(x).unflatten(-1, (sum(sizes), -1)).transpose(1, 2).split(sizes, dim=1)
        if self.rotary is None:
            return q, k, v
        return self.rotary(q, start), self.rotary(k, start), v


class FeedForward(nn.Module):
    """GPT-2's: two linear layers around a GELU, at each position alone."""

    def __init__(self, embed_dim: int, hidden_dim: int, dropout: float, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(embed_dim, hidden_dim, bias)
        self.down = ResidualLinear(hidden_dim, embed_dim, bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(gelu(self.up(x))))


class SwiGLU(nn.Module):
    """Llama's: a third linear layer gates what goes through the other two (Shazeer, 2020, "GLU Variants")."""

    def __init__(self, embed_dim: int, hidden_dim: int, dropout: float, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(embed_dim, hidden_dim, bias)
        self.up = nn.Linear(embed_dim, hidden_dim, bias)
        self.down = ResidualLinear(hidden_dim, embed_dim, bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.silu(self.gate(x)) * self.up(x)))


@dataclass(frozen=True)
class Architecture:
    """What the families of models differ in.

    Args:
        is_rotary: whether queries and keys are turned by their positions; else each position has a learned vector,
            which is added to the embedding of the token.
        norm: makes the normalization of vectors of a size, with an epsilon.
        feed_forward: the class of the feed-forward layer.
        bias: whether linear layers add one.
    """

    is_rotary: bool
    norm: Callable[[int, float], nn.Module]
    feed_forward: type[nn.Module]
    bias: bool


GPT2 = Architecture(is_rotary=False, norm=nn.LayerNorm, feed_forward=FeedForward, bias=True)
LLAMA = Architecture(is_rotary=True, norm=nn.RMSNorm, feed_forward=SwiGLU, bias=False)


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        hidden_dim: int,
        dropout: float,
        architecture: Architecture = GPT2,
        num_kv_heads: int | None = None,
        norm_eps: float = 1e-5,
        rotary: RotaryEmbedding | None = None,
    ) -> None:
        super().__init__()
        self.attn_norm = architecture.norm(embed_dim, norm_eps)
        self.attn = CausalSelfAttention(embed_dim, num_heads, dropout, num_kv_heads, architecture.bias, rotary)
        self.ff_norm = architecture.norm(embed_dim, norm_eps)
        self.ff = architecture.feed_forward(embed_dim, hidden_dim, dropout, architecture.bias)

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
        architecture: the family, `gpt2` or `llama`.
        num_kv_heads: heads of keys and values in a layer; divides num_heads, which it is by default.
        rope_theta: how slowly the slowest rotary angle turns; `llama` alone has them.
        norm_eps: added to the variance, or to the mean square, in a normalization.
        tie_embeddings: whether the output layer is the token embedding; else it has a matrix of its own.

    Raises:
        InputError: a size below 1, heads that do not divide the embedding or are not divided by those of keys and
            values, another value out of its range, or an option that the architecture does not have.
    """

    architectures: ClassVar[Mapping[str, Architecture]] = {"gpt2": GPT2, "llama": LLAMA}
    changeable_options: ClassVar[frozenset[str]] = frozenset({"dropout"})
    """The options that may change when a run goes on."""

    def __init__(
        self,
        vocab_size: int = 10_000,
        embed_dim: int = 128,
        num_heads: int = 4,
        num_layers: int = 2,
        hidden_dim: int = 512,
        max_seq_len: int = 128,
        dropout: float = 0.0,
        architecture: Literal["gpt2", "llama"] = "gpt2",
        num_kv_heads: int | None = None,
        rope_theta: float = ROPE_THETA,
        norm_eps: float = 1e-5,
        tie_embeddings: bool = True,
    ) -> None:
        super().__init__()
        sizes = {
            "vocab_size": vocab_size,
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "num_layers": num_layers,
            "hidden_dim": hidden_dim,
            "max_seq_len": max_seq_len,
            "num_kv_heads": 1 if num_kv_heads is None else num_kv_heads,
        }
        for name, size in sizes.items():
            check(size >= 1, f"{name}={size} must be at least 1")
        check(
            embed_dim % num_heads == 0,
            f"embed_dim={embed_dim} is not divisible by num_heads={num_heads}: every head takes an equal share",
        )
        check(
            num_heads % sizes["num_kv_heads"] == 0,
            f"num_heads={num_heads} is not divisible by num_kv_heads={num_kv_heads}: heads share these in equal groups",
        )
        check(0.0 <= dropout < 1.0, f"dropout={dropout} must be at least 0 and below 1")
        check(0.0 < norm_eps < 1.0, f"norm_eps={norm_eps} must be above 0 and below 1")
        known = ", ".join(self.architectures)
        check(architecture in self.architectures, f"architecture={architecture} must be one of {known}")
        parts, head_dim = self.architectures[architecture], embed_dim // num_heads
        if parts.is_rotary:
            check(1.0 <= rope_theta < math.inf, f"rope_theta={rope_theta} must be at least 1 and finite")
            check(
                head_dim % 2 == 0,
                f"embed_dim={embed_dim} / num_heads={num_heads} is odd: rotary positions turn pairs of values",
            )
        else:
            is_default = rope_theta == ROPE_THETA
            check(is_default, f"rope_theta={rope_theta} has no effect under architecture={architecture}: leave it out")

        self.max_seq_len = max_seq_len
        self.token_embedding = nn.Embedding(vocab_size, embed_dim)
        self.position_embedding = None if parts.is_rotary else nn.Embedding(max_seq_len, embed_dim)
        self.rotary = RotaryEmbedding(max_seq_len, head_dim, rope_theta) if parts.is_rotary else None
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, hidden_dim, dropout, parts, num_kv_heads, norm_eps, self.rotary)
            for _ in range(num_layers)
        )
        self.final_norm = parts.norm(embed_dim, norm_eps)
        self.output = None if tie_embeddings else nn.Linear(embed_dim, vocab_size, bias=False)
        self.reset_parameters()

    @classmethod
    def options_open_to_a_new_run(cls, options: Mapping[str, Any]) -> frozenset[str]:
        """The options that may change when a new run begins with trained weights of a network with these options.

        Rotary positions have no weights, so windows may have another length.
        """
        is_rotary = cls.architectures[options["architecture"]].is_rotary
        return cls.changeable_options | ({"max_seq_len"} if is_rotary else set())

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
        """The embedding (B, T, D) of tokens (B, T) and, if it is learned, of their positions, from `start` on."""
        x = self.token_embedding(tokens)
        if self.position_embedding is None:
            return x
        return x + self.position_embedding.weight[start : start + tokens.shape[1]]  # (T, D)

    def new_caches(self) -> list[KVCache]:
        """Empty caches for `forward`, in which it keeps the keys and values of the tokens that it has seen."""
        return [KVCache(self.max_seq_len) for _ in self.blocks]

    @property
    def output_weight(self) -> Tensor:
        """The matrix (V, D) of the output layer, by default tied to the token embedding."""
        return self.token_embedding.weight if self.output is None else self.output.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer: hidden states (..., D) to logits (..., V)."""
        return F.linear(hidden, self.output_weight)

"""Tokens (B, T) in, hidden states (B, T, D) out: the decoder of GPT-2, pre-norm, with a tied output layer.

B batch, T time, D embedding, H heads, F feed-forward hidden, V vocabulary.

The mathematics is that of GPT-2 (Radford et al., 2019, "Language Models are Unsupervised Multitask Learners"), so its
weights fit one to one.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.errors import InputError, check

WRITTEN_OUT_UP_TO = 256
"""Sequence length up to which attention on a CPU is written out.

Measured on two cores with AVX512-bf16 (torch 2.13), 4 heads of 32, 4,096 tokens, forward and backward in ms, written
out against torch's fused kernel: bf16 10 and 26 at 128, 14 and 23 at 256, 82 and 39 at 1,024; fp32 12 and 14, 23 and
19, 159 and 48. Beyond it the scores (B, H, T, T) would also take more memory than all the rest.
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

    On a CPU from 16 random bits a value, p rounded to them: three times as fast as torch's dropout, which spends most
    of its time on random numbers, and half of a training step.
    """
    if p == 0.0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    dropped = min(round(p * 2**16), 2**16 - 1)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return x * (kept.to(x.dtype) * (2**16 / (2**16 - dropped)))


class Past:
    """The keys and values of the positions that one attention layer has seen, with room for `max_seq_len` of them."""

    def __init__(self, max_seq_len: int) -> None:
        self.max_seq_len = max_seq_len
        self.length = 0
        self.keys = self.values = torch.empty(0)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of the next positions, (B, H, T, D / H) each; returns those of all."""
        if self.length == 0:
            batch_size, num_heads, _, head_dim = k.shape
            self.keys, self.values = k.new_empty(2, batch_size, num_heads, self.max_seq_len, head_dim)
        start, self.length = self.length, self.length + k.shape[-2]
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class CausalSelfAttention(nn.Module):
    """Each position attends to itself and to those before it (Vaswani et al., 2017)."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = dropout
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        q, k, v = self.heads(x)
        if past is not None:
            k, v = past.extend(k, v)
        attended = causal_attention(q, k, v, self.attention_dropout if self.training else 0.0)
        return self.dropout(self.out(attended.transpose(1, 2).flatten(2)))  # (B, T, D)

    def heads(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values of every head, (B, H, T, D / H) each, of x (B, T, D)."""
        return [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Softmax of the scaled scores of each position with those up to it, times v; all (B, H, T, D / H).

    The queries are those of all positions, or that of the last one alone.
    """
    num_queries = q.shape[-2]
    if q.device.type != "cpu" or num_queries > WRITTEN_OUT_UP_TO:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=num_queries > 1)
    return drop(causal_weights(q, k), dropout) @ v


def causal_weights(q: Tensor, k: Tensor) -> Tensor:
    """How much each position attends to each up to it (B, H, T, T); the last one alone to all, if q is its alone."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    num_queries = q.shape[-2]
    if num_queries > 1:
        scores = scores + torch.full((num_queries, num_queries), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    return scores.softmax(-1)


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
        self.down = nn.Linear(hidden_dim, embed_dim)
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

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), past)
        return x + self.ff(self.ff_norm(x))


class Transformer(nn.Module):
    """A causal Transformer language model; its constructor takes every size and has no default.

    Raises:
        InputError: a size that is not a positive whole number, heads that do not divide the embedding, a dropout
            outside [0, 1).
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        num_heads: int,
        num_layers: int,
        hidden_dim: int,
        max_seq_len: int,
        dropout: float,
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
        """GPT-2's initialization: N(0, 0.02), residual projections divided by the root of their number, biases 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                is_residual = name.endswith(("attn.out.weight", "ff.down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.blocks)) if is_residual else 0.02)

    def forward(self, tokens: Tensor, cache: Sequence[Past] | None = None) -> Tensor:
        """Hidden states (B, T, D) of tokens (B, T).

        Args:
            tokens: a whole sequence, or with a `new_cache` that has seen its beginning, the next token of it (B, 1).
            cache: of a sequence that is still growing; it is extended.

        Raises:
            InputError: the sequence is longer than `max_seq_len`.
        """
        start = cache[0].length if cache is not None else 0
        end = start + tokens.shape[1]
        if end > self.max_seq_len:
            raise InputError(
                f"a sequence of {end} tokens is longer than max_seq_len={self.max_seq_len}: "
                "shorten it, or train a model with a larger max_seq_len"
            )
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding.weight[start:end])  # (B, T, D)
        pasts: Sequence[Past | None] = cache or [None] * len(self.blocks)
        for block, past in zip(self.blocks, pasts, strict=True):
            x = block(x, past)
        return self.final_norm(x)

    def new_cache(self) -> list[Past]:
        """An empty `Past` for each block, for sequences (B, T) that grow up to `max_seq_len`."""
        return [Past(self.max_seq_len) for _ in self.blocks]

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer, tied to the token embedding: hidden states (..., D) to logits (..., V)."""
        return F.linear(hidden, self.token_embedding.weight)

"""Tokens (B, T) in, hidden states (B, T, D) out: the decoder of GPT-2, pre-norm, with a tied output layer.

B batch, T time, D embedding, H heads, F feed-forward hidden, V vocabulary.

The mathematics is that of GPT-2 (Radford et al., 2019, "Language Models are Unsupervised Multitask Learners"), so its
weights fit one to one.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.errors import InputError, check

WRITTEN_OUT_UP_TO = 256
IN_32_BITS_UP_TO = 64
"""Sequence length up to which attention on a CPU is written out; the latter in 32 bits, where nothing is dropped.

Measured on two cores, 4,096 tokens, forward and backward in ms, written out against torch's fused kernel. With
AVX512-bf16 (torch 2.13), 4 heads of 32, in bf16: 10 and 26 at 128, 14 and 23 at 256, 82 and 39 at 1,024. With AVX2
alone, 8 heads of 32, in 32 bits: 14 and 15 at 64, 25 and 23 at 128, 75 and 36 at 256; with dropout 20 and 37, 43 and
76, 119 and 171. Beyond 256 the scores (B, H, T, T) would also take more memory than all the rest.
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


class CausalSelfAttention(nn.Module):
    """Each position attends to itself and to those before it (Vaswani et al., 2017)."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = dropout
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        attended = causal_attention(q, k, v, self.attention_dropout if self.training else 0.0)
        return self.dropout(self.out(attended.transpose(1, 2).flatten(2)))  # (B, T, D)

    def heads(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values of every head, (B, H, T, D / H) each, of x (B, T, D)."""
        return [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Softmax of the scaled scores of each position with those up to it, times v; all (B, H, T, D / H)."""
    longest = IN_32_BITS_UP_TO if q.dtype == torch.float32 and dropout == 0 else WRITTEN_OUT_UP_TO
    if q.device.type != "cpu" or q.shape[-2] > longest:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    return drop(causal_weights(q, k), dropout) @ v


def causal_weights(q: Tensor, k: Tensor) -> Tensor:
    """How much each position attends to each one up to it, (B, H, T, T), of q and k (B, H, T, D / H)."""
    seq_len = q.shape[-2]
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    future = torch.full((seq_len, seq_len), -math.inf, dtype=scores.dtype, device=scores.device).triu(1)
    return (scores + future).softmax(-1)


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

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
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
        self.num_heads = num_heads
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

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states (B, T, D) of tokens (B, T); raises InputError where T is above `max_seq_len`."""
        seq_len = tokens.shape[1]
        if seq_len > self.max_seq_len:
            raise InputError(
                f"a sequence of {seq_len} tokens is longer than max_seq_len={self.max_seq_len}: "
                "shorten it, or train a model with a larger max_seq_len"
            )
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding.weight[:seq_len])  # (B, T, D)
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer, tied to the token embedding: hidden states (..., D) to logits (..., V)."""
        return F.linear(hidden, self.token_embedding.weight)

"""What a researcher would swap, each as it is swapped: by a class that is named on the command line."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm import LanguageModel
from slm.data import TokenData
from slm.model.functional import gelu
from slm.model.transformer import CausalSelfAttention, Transformer


class RotaryAttention(CausalSelfAttention):
    """Turns queries and keys by their positions (Su et al., 2021, "RoFormer")."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float, rope_theta: float) -> None:
        super().__init__(embed_dim, num_heads, dropout)
        half = embed_dim // num_heads // 2
        self.register_buffer("speeds", rope_theta ** -(torch.arange(half) / half), persistent=False)

    def heads(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(x, start)
        angles = torch.outer(torch.arange(start, start + x.shape[1], device=x.device), self.speeds)
        return turned(q, angles), turned(k, angles), v


def turned(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


class RotaryTransformer(Transformer):
    def __init__(self, rope_theta: float = 10_000.0, **options: Any) -> None:
        super().__init__(**options)
        del self.position_embedding
        for block in self.blocks:
            attn: Any = block.attn
            dropout = attn.attention_dropout
            block.attn = RotaryAttention(attn.out.in_features, attn.num_heads, dropout, rope_theta)
        self.reset_parameters()

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        return self.token_embedding(tokens)


class RotaryModel(LanguageModel):
    network = RotaryTransformer


class Experts(nn.Module):
    """A feed-forward layer of which each token takes one of several (Fedus et al., 2021, "Switch Transformers")."""

    def __init__(self, embed_dim: int, hidden_dim: int, num_experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(embed_dim, num_experts, bias=False)
        self.up = nn.Parameter(0.02 * torch.randn(num_experts, embed_dim, hidden_dim))
        self.down = nn.Parameter(0.02 * torch.randn(num_experts, hidden_dim, embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router(x).softmax(-1).max(-1)  # (B, T)
        every = torch.einsum("btef,efd->bted", gelu(torch.einsum("btd,edf->btef", x, self.up)), self.down)
        return torch.einsum("bted,bte->btd", every, F.one_hot(chosen, len(self.up)) * share[..., None])


class ExpertsTransformer(Transformer):
    def __init__(self, num_experts: int = 4, **options: Any) -> None:
        super().__init__(**options)
        for block in self.blocks:
            ff: Any = block.ff
            block.ff = Experts(ff.up.in_features, ff.up.out_features, num_experts)


class ExpertsModel(LanguageModel):
    network = ExpertsTransformer


class ZLossModel(LanguageModel):
    """Keeps the logits' normalizer near 1 (Chowdhery et al., 2022, "PaLM").

    Args:
        z_loss: weight of the squared logarithm of the normalizer.
    """

    def __init__(self, z_loss: float = 1e-4, **options: Any) -> None:
        super().__init__(**options)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        normalizer = self.transformer.logits(hidden).logsumexp(-1)
        return super().loss(hidden, targets) + self.hparams["z_loss"] * normalizer.square().mean()


class Multiples(TokenData):
    """The multiples of a number, one after another.

    Args:
        factor: the number.
        num_tokens: how many.
    """

    def __init__(self, *args: Any, factor: int = 3, num_tokens: int = 2000, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def stream(self) -> Tensor:
        return torch.arange(self.hparams["num_tokens"]) * self.hparams["factor"] % self.hparams["vocab_size"]

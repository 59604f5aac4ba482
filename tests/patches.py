"""What a researcher would swap, each as it is swapped: by a class that is named on the command line."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm import LanguageModel
from slm.data import TokenData
from slm.model.functional import gelu
from slm.model.transformer import GPT2, Transformer


class RotaryTransformer(Transformer):
    """GPT-2 in all but its positions."""

    architectures: ClassVar = {"gpt2": replace(GPT2, is_rotary=True)}


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

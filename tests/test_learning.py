"""What training reaches, against what is known to be possible."""

import math
from typing import Any

import pytest
import torch
from conftest import fit
from torch import Tensor, nn

from slm.data import DummyData
from slm.data.dummy import MarkovSource
from slm.training.language_model import LanguageModel


class NoAttention(nn.Module):
    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        return torch.zeros_like(x)


def train(data: DummyData, attention: bool = True, max_epochs: int = 7) -> float:
    """The validation loss after training a small model to convergence."""
    torch.manual_seed(0)
    sizes = {"vocab_size": data.hparams["vocab_size"], "max_seq_len": data.hparams["max_seq_len"]}
    model = LanguageModel(
        **sizes,
        embed_dim=32,
        num_heads=4,
        num_layers=1,
        hidden_dim=128,
        learning_rate=1e-2,
        weight_decay=0.0,
        schedule="cosine",
    )
    if not attention:
        for block in model.transformer.blocks:
            block.attn = NoAttention()  # type: ignore[assignment]
    return fit(model, data, max_epochs=max_epochs).callback_metrics["val/loss"].item()


def oracle_loss(data: DummyData) -> float:
    """The loss of the source's own probabilities on the held-out windows."""
    source = data.source
    assert isinstance(source, MarkovSource)
    assert data.val_windows is not None
    tokens = data.val_windows.stream.view(-1)
    classes, ranks = tokens % source.num_classes, tokens // source.num_classes
    after_one = torch.einsum("ab,abc->bc", source.pairs, source.transitions) / source.pairs.sum(0)[:, None]
    seq_len, total = data.val_windows.seq_len, 0.0
    for k in range(len(data.val_windows)):
        start = k * seq_len
        for t in range(start + 1, start + seq_len + 1):
            a, b, c = classes[t - 2], classes[t - 1], classes[t]
            probability = after_one[b, c] if t == start + 1 else source.transitions[a, b, c]
            total -= math.log(probability * source.emissions[c, ranks[t]])
    return total / (len(data.val_windows) * seq_len)


@pytest.fixture(scope="module")
def markov() -> DummyData:
    data = DummyData(8, 64, batch_size=16, num_tokens=200_000)
    data.setup()
    return data


@pytest.mark.slow
def test_on_a_markov_source_it_comes_near_the_entropy_rate_and_never_below_the_oracle(markov: DummyData) -> None:
    loss, oracle = train(markov), oracle_loss(markov)
    assert loss < markov.source.entropy_rate + 0.05
    assert loss > oracle - 0.005


@pytest.mark.slow
def test_without_attention_it_stays_at_the_best_bigram(markov: DummyData) -> None:
    loss = train(markov, attention=False, max_epochs=3)
    assert loss == pytest.approx(markov.source.bigram_entropy, abs=0.03)
    assert loss > markov.source.entropy_rate + 1.0


@pytest.mark.slow
def test_on_uniform_tokens_no_training_validates_below_the_entropy() -> None:
    data = DummyData(20, 32, source="uniform", num_tokens=40_000, val_fraction=0.5)
    assert train(data, max_epochs=15) > math.log(20) - 0.02

"""The parts of Llama, each against an oracle of another hand, and the options that come with them."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import small_model

from slm.errors import InputError
from slm.model import functional
from slm.model.transformer import LLAMA, Block, RotaryEmbedding, SwiGLU, Transformer
from slm.training.optimizers import build_optimizer

LLAMA_OPTIONS: dict[str, Any] = {"architecture": "llama", "embed_dim": 24, "num_heads": 6, "num_kv_heads": 2}


def test_a_pair_of_values_is_turned_as_a_complex_number_is() -> None:
    rotary, x = RotaryEmbedding(50, head_dim=8, theta=100.0).double(), torch.randn(2, 3, 9, 8, dtype=torch.float64)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    positions = torch.arange(5, 14, dtype=torch.float64)
    angles = positions[:, None] / 100.0 ** (torch.arange(4) / 4)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rotary(x, 5), torch.cat([turned.real, turned.imag], -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(rotary.turned_back(rotary(x, 5), by=5), rotary(x, 0), atol=1e-5, rtol=0)


def test_only_distances_count_between_rotary_positions() -> None:
    torch.manual_seed(0)
    block = Block(24, 6, 48, 0.0, LLAMA, num_kv_heads=2, rotary=RotaryEmbedding(40, 4, 10_000.0))
    x = torch.randn(1, 9, 24)
    caches = [(q, k) for q, k, _ in (block.attn.heads(x, start) for start in (0, 31))]
    products = [q @ k.repeat_interleave(3, dim=1).transpose(-2, -1) for q, k in caches]
    torch.testing.assert_close(*products, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(caches[0][0], caches[1][0], atol=1e-2)


def test_swiglu_gates_what_goes_up() -> None:
    torch.manual_seed(0)
    layer, x = SwiGLU(8, 12, dropout=0.0), torch.randn(2, 3, 8)
    gate, up, down = (matrix.weight.T for matrix in (layer.gate, layer.up, layer.down))
    gated = x @ gate
    torch.testing.assert_close(layer(x), (gated / (1 + (-gated).exp()) * (x @ up)) @ down)


@pytest.mark.parametrize("seq_len", [1, 7, functional.PLAIN_UP_TO_IN_32_BITS + 1, functional.PLAIN_UP_TO + 1])
@pytest.mark.parametrize("num_seen", [0, 5])
def test_grouped_attention_is_that_with_each_head_of_keys_and_values_repeated(seq_len: int, num_seen: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 6, seq_len, 8, requires_grad=True)
    k, v = (torch.randn(2, 2, num_seen + seq_len, 8, requires_grad=True) for _ in range(2))
    mask = torch.ones(seq_len, num_seen + seq_len, dtype=torch.bool).tril(num_seen)
    repeated = (x.repeat_interleave(3, dim=1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, *repeated, attn_mask=mask)
    ours = functional.causal_attention(q, k, v, dropout=0.0)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    direction = torch.randn_like(ours)
    for mine, other in zip(*(torch.autograd.grad(out, (q, k, v), direction) for out in (ours, expected)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_a_changed_token_changes_no_logit_of_a_llama_before_it_and_some_from_it_on() -> None:
    transformer = small_model(**LLAMA_OPTIONS).transformer.eval()
    tokens = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(1))
    for position in range(12):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 20
        before, after = (transformer.logits(transformer(t)) for t in (tokens, changed))
        assert torch.equal(before[:, :position], after[:, :position])
        assert (before[:, position:] != after[:, position:]).flatten(1).any(-1).all()


def test_the_parameters_are_those_of_a_llama_of_this_size() -> None:
    embed, hidden, kv = 24, 32, 2 * 4
    layer = 2 * embed * embed + 2 * embed * kv + 3 * embed * hidden + 2 * embed
    expected = 20 * embed + layer + embed
    tied, untied = (small_model(**LLAMA_OPTIONS, tie_embeddings=tie).transformer for tie in (True, False))
    assert sum(p.numel() for p in tied.parameters()) == expected
    assert sum(p.numel() for p in untied.parameters()) == expected + 20 * embed
    assert not any(name.endswith("bias") for name in tied.state_dict())
    assert len(tied.state_dict()) == len([*tied.parameters()])  # the angles are no weights


def test_an_untied_output_layer_starts_like_the_embedding_and_muon_leaves_it_to_adamw() -> None:
    model = small_model(**LLAMA_OPTIONS, tie_embeddings=False, optimizer="muon", vocab_size=2000)
    assert model.transformer.output_weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(model.transformer.output_weight, model.transformer.token_embedding.weight)
    matrices, decayed, _ = build_optimizer(model.transformer, model.hparams, fused=False).param_groups
    assert id(model.transformer.output_weight) in {id(p) for p in decayed["params"]}
    assert len(matrices["params"]) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "mamba"}, "architecture=mamba must be one of gpt2, llama"),
        ({"num_kv_heads": 0}, "num_kv_heads=0 must be at least 1"),
        ({"num_kv_heads": 4}, "num_heads=6 is not divisible by num_kv_heads=4"),
        ({"num_heads": 8, "num_kv_heads": None}, "embed_dim=24 / num_heads=8 is odd: rotary positions turn pairs"),
        ({"rope_theta": 0.5}, "rope_theta=0.5 must be at least 1 and finite"),
        ({"rope_theta": math.inf}, "rope_theta=inf must be at least 1 and finite"),
        ({"architecture": "gpt2", "rope_theta": 500.0}, "rope_theta=500.0 has no effect under architecture=gpt2"),
        ({"norm_eps": 0.0}, "norm_eps=0.0 must be above 0 and below 1"),
        ({"norm_eps": math.nan}, "norm_eps=nan must be above 0 and below 1"),
    ],
)
def test_an_option_out_of_its_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Transformer(**{**LLAMA_OPTIONS, **options})

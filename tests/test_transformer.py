import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from slm.errors import InputError
from slm.model import functional
from slm.model.functional import drop
from slm.model.transformer import Block, CausalSelfAttention, FeedForward, Transformer

SIZES = {
    "vocab_size": 50,
    "embed_dim": 32,
    "num_heads": 4,
    "num_layers": 2,
    "hidden_dim": 64,
    "max_seq_len": 12,
    "dropout": 0.0,
}


def make(**changes: float) -> Transformer:
    torch.manual_seed(0)
    return Transformer(**{**SIZES, **changes})


def test_a_block_equals_torchs_encoder_layer_under_a_causal_mask() -> None:
    torch.manual_seed(0)
    block = Block(embed_dim=32, num_heads=4, hidden_dim=64, dropout=0.0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    gelu = partial(F.gelu, approximate="tanh")
    oracle = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation=gelu, batch_first=True, norm_first=True)
    pairs = {
        "self_attn.in_proj_weight": block.attn.qkv.weight,
        "self_attn.in_proj_bias": block.attn.qkv.bias,
        "self_attn.out_proj.weight": block.attn.out.weight,
        "self_attn.out_proj.bias": block.attn.out.bias,
        "linear1.weight": block.ff.up.weight,
        "linear1.bias": block.ff.up.bias,
        "linear2.weight": block.ff.down.weight,
        "linear2.bias": block.ff.down.bias,
        "norm1.weight": block.attn_norm.weight,
        "norm1.bias": block.attn_norm.bias,
        "norm2.weight": block.ff_norm.weight,
        "norm2.bias": block.ff_norm.bias,
    }
    oracle.load_state_dict({name: value.detach() for name, value in pairs.items()})
    x = torch.randn(3, 7, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    torch.testing.assert_close(block(x), oracle(x, src_mask=mask, is_causal=True), rtol=1e-5, atol=1e-5)


def test_a_changed_token_changes_no_logit_before_it_and_some_from_it_on() -> None:
    transformer = make().eval()
    tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))
    for position in range(12):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 50
        before, after = (transformer.logits(transformer(t)) for t in (tokens, changed))
        assert torch.equal(before[:, :position], after[:, :position])
        assert (before[:, position:] != after[:, position:]).flatten(1).any(-1).all()


def test_a_one_layer_model_sees_positions() -> None:
    transformer = make(num_layers=1).eval()
    repeated = torch.full((1, 12), 7)
    logits = transformer.logits(transformer(repeated))[0]
    assert all(not torch.equal(logits[0], later) for later in logits[1:])


def test_a_new_model_is_as_undecided_as_a_uniform_guess() -> None:
    transformer = make(vocab_size=10_000, embed_dim=128, max_seq_len=128, hidden_dim=512)
    tokens = torch.randint(10_000, (4, 129), generator=torch.Generator().manual_seed(1))
    logits = transformer.logits(transformer(tokens[:, :-1]))
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(10_000), abs=0.05)


def test_the_initialization_is_that_of_gpt2() -> None:
    transformer = make(vocab_size=2000, embed_dim=256, hidden_dim=1024, num_layers=8)
    residual = 0.02 / math.sqrt(2 * 8)
    for name, parameter in transformer.named_parameters():
        if parameter.ndim == 2:
            expected = residual if name.endswith(("attn.out.weight", "ff.down.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm.weight" in name))), name


def test_the_output_layer_is_tied_to_the_token_embedding() -> None:
    transformer = make()
    assert not any("head" in name or "output" in name for name in transformer.state_dict())
    hidden = torch.randn(2, 3, 32)
    assert torch.equal(transformer.logits(hidden), hidden @ transformer.token_embedding.weight.T)


def test_the_parameters_are_those_of_a_gpt2_of_this_size() -> None:
    embed, hidden = 32, 64
    layer = 4 * embed * embed + 4 * embed + 2 * embed * hidden + hidden + embed + 4 * embed
    assert sum(p.numel() for p in make().parameters()) == 50 * embed + 12 * embed + 2 * layer + 2 * embed


@pytest.mark.parametrize("inner", [True, False])
def test_dropout_acts_on_attention_weights_and_on_what_each_branch_adds(inner: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 9, 8)
    attention, feed_forward = CausalSelfAttention(8, 2, dropout=0.5), FeedForward(8, 16, dropout=0.5)
    if inner:
        attention.dropout.p = 0.0
    else:
        attention.attention_dropout = 0.0
    assert not torch.equal(attention(x), attention(x))
    assert not torch.equal(feed_forward(x), feed_forward(x))


def test_dropout_acts_in_training_alone() -> None:
    transformer = make(dropout=0.5)
    tokens = torch.randint(50, (2, 12))
    assert not torch.equal(transformer(tokens), transformer(tokens))
    transformer.eval()
    assert torch.equal(transformer(tokens), transformer(tokens))


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_is_dropped_with_its_probability_and_the_mean_stays(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(1001, 999, dtype=dtype, requires_grad=True)
    y = drop(x, p)
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=4 * math.sqrt(p * (1 - p) / 1e6))
    assert torch.allclose(y[kept].float(), torch.tensor(1 / (1 - p)), rtol=1e-2 if dtype == torch.bfloat16 else 1e-3)
    assert kept.float().mean(0).std() == pytest.approx(math.sqrt(p * (1 - p) / 1001), rel=0.15)  # of each on its own
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # type: ignore[arg-type]


def test_what_is_dropped_follows_the_seed_and_nothing_is_at_0() -> None:
    x = torch.randn(7, 13)
    draws = [torch.random.manual_seed(seed) and drop(x, 0.5) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert drop(x, 0.0) is x


@pytest.mark.parametrize("changes", [{name: 0} for name in SIZES if name != "dropout"] + [{"vocab_size": -3}])
def test_a_size_below_one_is_refused_with_its_value(changes: dict[str, int]) -> None:
    [(name, value)] = changes.items()
    with pytest.raises(InputError, match=f"{name}={value} must be at least 1"):
        make(**changes)


def test_heads_that_do_not_divide_the_embedding_are_refused_with_both_numbers() -> None:
    with pytest.raises(InputError, match="embed_dim=130 is not divisible by num_heads=4"):
        make(embed_dim=130)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
def test_a_dropout_outside_its_range_is_refused(dropout: float) -> None:
    with pytest.raises(InputError, match=f"dropout={dropout} must be"):
        make(dropout=dropout)


def test_a_sequence_above_max_seq_len_is_refused_with_both_numbers() -> None:
    with pytest.raises(InputError, match="13 tokens is longer than max_seq_len=12"):
        make()(torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seq_len", [1, 7, functional.PLAIN_UP_TO_IN_32_BITS + 1, functional.PLAIN_UP_TO + 1])
def test_attention_is_that_of_torch_in_value_and_gradients_however_it_is_computed(
    seq_len: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, 3, seq_len, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    ours = functional.causal_attention(*given, dropout=0.0)
    with sdpa_kernel(SDPBackend.MATH):
        fused = F.scaled_dot_product_attention(*given, is_causal=True)
    torch.testing.assert_close(ours, fused, rtol=1e-5, atol=1e-6)
    direction = torch.randn_like(ours)
    for mine, other in zip(*(torch.autograd.grad(out, given, direction) for out in (ours, fused)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seq_len", [8, functional.PLAIN_UP_TO + 1])
def test_dropout_reaches_the_attention_weights(seq_len: int) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, seq_len, 4) for _ in range(2))
    summed = functional.causal_attention(q, k, torch.ones(1, 1, seq_len, 4), dropout=0.5)
    assert summed[..., 0, :].unique().item() in (0.0, 2.0)
    assert summed.std() > 0.01


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_activation_is_gelu_in_value_and_gradient(compiled: bool) -> None:
    gelu = torch.compile(functional.gelu, backend="aot_eager") if compiled else functional.gelu
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64, requires_grad=True)
    outputs = gelu(x), F.gelu(x, approximate="tanh")
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(output.sum(), x)[0] for output in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 2e-6), (torch.bfloat16, 0.02)])
def test_the_activation_in_fewer_bits_is_near_the_exact_one(dtype: torch.dtype, largest: float) -> None:
    x = torch.linspace(-9, 9, 1001).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    outputs = functional.gelu(x), F.gelu(exact, approximate="tanh")
    gradients = [torch.autograd.grad(output.sum(), value)[0] for output, value in zip(outputs, (x, exact), strict=True)]
    for mine, other in (outputs, gradients):
        assert ((mine.double() - other).abs() / other.abs().clamp(min=1.0)).max() <= largest

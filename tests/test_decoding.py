"""Tokens come from the cache as from the whole sequence, also past the end of the context, and are drawn as asked."""

from itertools import islice
from typing import Any

import pytest
import torch
from conftest import likeliest, small_model
from torch import Tensor

from slm.errors import InputError
from slm.model.sampling import (
    NUMBERS_AT_ONCE,
    Race,
    Sampler,
    SumsOfProbabilities,
    decode,
    lay_out_by_columns,
    without_call_overhead,
)
from slm.model.transformer import CausalSelfAttention, KVCache, Transformer


def window_after(tokens: list[int], num_given: int, max_seq_len: int) -> list[int]:
    """What the network sees of tokens, the first of which were given, by the rule in the docstring of `decode`."""
    start = max(0, num_given - max_seq_len)
    for end in range(num_given + 1, len(tokens) + 1):
        if end - start > max_seq_len:
            start = end - max(1, max_seq_len // 2)
    return tokens[start:]


def network(max_seq_len: int = 16, **options: Any) -> Transformer:
    transformer = small_model(max_seq_len=max_seq_len, num_layers=2, **options).transformer.eval()
    for parameter in transformer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # biases, norms and what is attended to count too
    return transformer


@pytest.mark.parametrize(("max_seq_len", "num_given"), [(16, 3), (16, 16), (16, 40), (7, 2), (1, 1)])
def test_greedy_tokens_and_logits_are_those_of_the_network_without_a_cache(max_seq_len: int, num_given: int) -> None:
    transformer = network(max_seq_len)
    tokens = torch.randint(20, (num_given,)).tolist()
    seen: list[Tensor] = []

    def choose(logits: Tensor) -> Tensor:
        seen.append(logits[0])
        return likeliest(logits)

    for chosen in islice(decode(transformer, torch.tensor([tokens]), choose), 3 * max_seq_len):
        window = window_after(tokens, num_given, max_seq_len)
        expected = transformer.logits(transformer(torch.tensor([window])))[0, -1]
        assert (seen[-1] - expected).abs().max() <= 1e-5
        assert chosen[0] == expected.argmax()
        tokens.append(int(chosen[0]))


@pytest.mark.parametrize("max_seq_len", [16, 20, 1])
def test_rotary_positions_forget_an_eighth_but_never_the_first_four_and_read_nothing_again(
    max_seq_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"architecture": "llama", "num_layers": 2, "num_kv_heads": 1}
    short, long = (small_model(max_seq_len=length, **options).transformer.eval() for length in (max_seq_len, 64))
    for parameter in long.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    short.load_state_dict(long.state_dict())
    seen: list[Tensor] = []

    def choose(logits: Tensor) -> Tensor:
        seen.append(logits[0])
        return likeliest(logits)

    start = torch.randint(20, (1, min(5, max_seq_len)))
    written = torch.cat([start[0], *islice(decode(short, start, choose), 60 - start.shape[1])])
    attended, num_forgotten, in_cache = torch.ones(60, 60, dtype=torch.bool).tril(), max(1, max_seq_len // 8), 0
    kept = 4 if max_seq_len > 4 else 0
    oldest, shifts = kept, []
    for position in range(60):
        if in_cache == max_seq_len:
            oldest, in_cache = oldest + num_forgotten, in_cache - num_forgotten
        attended[position, kept:oldest] = False
        shifts.append(oldest - kept)
        in_cache += 1

    def masked(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        nearer = [long.rotary.turned_back(q[:, :, t : t + 1], by) for t, by in enumerate(shifts)]  # to the first four
        scores = torch.cat([torch.cat(nearer, 2) @ k[..., :kept, :].mT, q @ k[..., kept:, :].mT], -1)
        return (scores * q.shape[-1] ** -0.5).masked_fill(~attended, -torch.inf).softmax(-1) @ v

    monkeypatch.setattr("slm.model.transformer.causal_attention", masked)
    expected = long.logits(long(written[None]))[0]  # under a mask of what was forgotten
    torch.testing.assert_close(torch.stack(seen), expected[start.shape[1] - 1 : -1], atol=1e-4, rtol=0)


def test_sequences_beside_one_another_do_not_mix() -> None:
    transformer = network()
    tokens = torch.randint(20, (3, 5))
    together = torch.stack(list(islice(decode(transformer, tokens, likeliest), 20)), 1)
    for row, expected in zip(tokens, together, strict=True):
        alone = torch.cat(list(islice(decode(transformer, row[None], likeliest), 20)))
        assert alone.tolist() == expected.tolist()


def test_the_network_sees_each_token_once_within_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    embed = Transformer.embed

    def counted(self: Transformer, tokens: Tensor, start: int = 0) -> Tensor:
        seen.append(tokens.shape[1])
        return embed(self, tokens, start)

    monkeypatch.setattr(Transformer, "embed", counted)
    list(islice(decode(network(), torch.tensor([[1, 2, 3]]), lambda logits: logits.argmax(-1)), 23))
    assert seen == [3, *[1] * 13, 8, *[1] * 8]


def test_several_tokens_at_once_go_on_from_a_cache_as_from_the_whole_sequence() -> None:
    transformer, tokens = network(), torch.randint(20, (2, 12))
    caches = transformer.new_caches()
    parts = [transformer(part, caches) for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:])]
    assert (torch.cat(parts, dim=1) - transformer(tokens)).abs().max() <= 1e-5
    assert isinstance(caches[0], KVCache)
    assert caches[0].length == 12
    with pytest.raises(InputError, match="a sequence of 17 tokens is longer than max_seq_len=16"):
        transformer(tokens[:, :5], caches)


def test_the_twin_without_the_cost_of_calls_computes_the_same_with_the_same_weights() -> None:
    transformer, tokens = network().train(), torch.randint(20, (2, 12))
    twin = without_call_overhead(transformer)
    assert torch.equal(twin(tokens), transformer.eval()(tokens))
    transformer.token_embedding.weight.data += 1
    assert torch.equal(twin(tokens), transformer(tokens))
    attention: Any = twin.blocks[1].attn
    assert isinstance(attention, CausalSelfAttention)
    for part in (twin, twin.blocks[1], attention, attention.qkv):
        assert type(part).__call__ is type(part).forward  # type: ignore[comparison-overlap]
        assert "weight" not in vars(part) or vars(part)["weight"] is not None


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_layer_by_columns_gives_the_same_logits(tied: bool) -> None:
    transformer = network(tie_embeddings=tied).eval()
    twin = without_call_overhead(transformer)
    before = transformer.output_weight
    lay_out_by_columns(twin)
    assert twin.output_weight.stride() == (1, 20)
    assert torch.equal(twin.output_weight, before)
    assert transformer.output_weight is before
    hidden = torch.randn(3, before.shape[1])
    torch.testing.assert_close(twin.logits(hidden), transformer.logits(hidden), rtol=1e-5, atol=1e-6)


class Louder(Transformer):
    def logits(self, hidden: Tensor) -> Tensor:
        assert self.output is not None
        return 2 * self.output(hidden)


def test_a_network_with_logits_of_its_own_writes_by_them() -> None:
    transformer = network(tie_embeddings=False)
    transformer.__class__ = Louder
    tokens, given = torch.tensor([[3, 1, 2]]), []

    def choose(logits: Tensor) -> Tensor:
        given.append(logits)
        return likeliest(logits)

    next(decode(transformer, tokens, choose))
    with torch.no_grad():
        expected = transformer.logits(transformer(tokens))[:, -1]
    torch.testing.assert_close(given[0], expected, rtol=1e-5, atol=1e-6)


def test_a_module_that_stands_at_two_places_is_used_at_both_by_the_twin() -> None:
    transformer, tokens = network().eval(), torch.randint(20, (2, 12))
    transformer.blocks[1] = transformer.blocks[0]
    transformer.blocks[0].unused = None
    assert torch.equal(without_call_overhead(transformer)(tokens), transformer(tokens))


def test_caches_that_are_fewer_than_the_blocks_are_no_way_past_these() -> None:
    transformer = network().eval()
    with pytest.raises(ValueError, match="shorter"):
        transformer(torch.randint(20, (2, 4)), transformer.new_caches()[:1])


def test_tokens_are_drawn_with_their_probabilities() -> None:
    logits = 2 * torch.randn(1, 20, generator=torch.Generator().manual_seed(1))
    drawn = Sampler(temperature=0.7, batch_size=4000)(logits.expand(4000, 20))
    expected = (logits[0] / 0.7).softmax(-1)
    assert torch.bincount(drawn, minlength=20) / 4000 == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("way", [SumsOfProbabilities, Race])
def test_both_ways_draw_with_the_same_probabilities(way: Any) -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.3, 0.2, 0.0])
    generators = [torch.Generator().manual_seed(row) for row in range(4000)]
    counts = torch.bincount(way(generators)(probabilities.expand(4000, 5)), minlength=5)
    assert counts / 4000 == pytest.approx(probabilities, abs=0.03)
    assert counts[0] == counts[4] == 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 2}, [0.5, 0.25, 0, 0]),
        ({"top_k": 9}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_p": 0.4}, [0.5, 0, 0, 0]),
        ({"top_p": 0.6}, [0.5, 0.25, 0, 0]),
        ({"top_p": 0.76}, [0.5, 0.25, 0.15, 0]),
        ({"top_k": 3, "top_p": 0.7}, [0.5, 0.25, 0, 0]),
    ],
)
def test_only_the_likeliest_tokens_are_left(settings: dict[str, float], expected: list[float]) -> None:
    order = torch.tensor([2, 0, 3, 1])
    logits = torch.empty(1, 4)
    logits[0, order] = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    sampler = Sampler(temperature=1.0, batch_size=1, **settings)  # type: ignore[arg-type]
    left = sampler.probabilities(logits)[0, order]
    assert left / left.sum() == pytest.approx(torch.tensor(expected) / sum(expected), abs=1e-6)
    assert all(left[order.tolist().index(int(sampler(logits)))] > 0 for _ in range(50))


def test_a_temperature_near_zero_takes_the_likeliest() -> None:
    logits = torch.tensor([[1.0, 3.0, -100.0, 2.9999]])
    assert Sampler(temperature=1e-38)(logits) == Sampler(temperature=0)(logits) == 1


def test_a_sequence_is_drawn_the_same_whatever_is_drawn_beside_it() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together = Sampler(seed=5, batch_size=3)
    alone = [Sampler(seed=5 + row) for row in range(3)]
    for _ in range(NUMBERS_AT_ONCE + 5):
        assert together(logits).tolist() == [int(sampler(logits[row : row + 1])) for row, sampler in enumerate(alone)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0 and finite"),
        ({"temperature": float("nan")}, "temperature=nan must be at least 0 and finite"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_a_value_out_of_range_is_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampler(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(temperature: float, bad: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    with pytest.raises(InputError, match="the model's logits are not finite"):
        Sampler(temperature, batch_size=2)(logits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_writes_the_same_tokens() -> None:
    transformer, tokens = network(), torch.tensor([[1, 2, 3]])
    expected = torch.cat(list(islice(decode(transformer, tokens, likeliest), 30)))
    found = torch.cat(list(islice(decode(transformer.cuda(), tokens.cuda(), Sampler(temperature=0)), 30)))
    assert found.tolist() == expected.tolist()

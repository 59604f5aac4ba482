import math
from collections import Counter, defaultdict

import pytest
import torch

from slm.data.dummy import MarkovSource, UniformSource


def estimate(tokens: list[int], order: int) -> float:
    """Entropy of a token given the `order` before it, from counts alone, in nats."""
    counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for position in range(order, len(tokens)):
        counts[tuple(tokens[position - order : position])][tokens[position]] += 1
    total = sum(sum(after.values()) for after in counts.values())
    return -sum(
        count / total * math.log(count / sum(after.values())) for after in counts.values() for count in after.values()
    )


def test_the_stated_entropies_equal_those_counted_in_a_long_sample() -> None:
    source = MarkovSource(vocab_size=10, seed=3)
    tokens = source.sample(400_000).tolist()
    assert estimate(tokens, 2) == pytest.approx(source.entropy_rate, abs=0.01)
    assert estimate(tokens, 1) == pytest.approx(source.bigram_entropy, abs=0.01)
    assert estimate(tokens, 0) == pytest.approx(source.unigram_entropy, abs=0.01)


def test_the_stated_accuracy_is_that_of_the_best_guesses_counted_in_a_sample() -> None:
    source = MarkovSource(vocab_size=10, seed=3)
    tokens = source.sample(400_000).tolist()
    hits = {}
    for order in (1, 2):
        counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for position in range(2, len(tokens)):
            counts[tuple(tokens[position - order : position])][tokens[position]] += 1
        hits[order] = sum(max(after.values()) for after in counts.values()) / (len(tokens) - 2)
    assert source.best_accuracy(1) == pytest.approx(hits[1], abs=0.005)
    assert source.best_accuracy(10**9) == pytest.approx(hits[2], abs=0.005)


def test_a_longer_memory_than_two_tokens_tells_nothing_more() -> None:
    source = MarkovSource(vocab_size=4, seed=0)
    tokens = source.sample(400_000).tolist()
    assert estimate(tokens, 3) == pytest.approx(source.entropy_rate, abs=0.01)


def test_the_default_source_needs_attention_and_is_far_from_its_unigram_entropy() -> None:
    source = MarkovSource(vocab_size=10_000, seed=0)
    assert source.entropy_rate + 1.0 < source.bigram_entropy < source.unigram_entropy - 1.0
    assert source.unigram_entropy < math.log(10_000)


def test_frequencies_follow_zipfs_law_over_the_whole_vocabulary() -> None:
    source = MarkovSource(vocab_size=10_000, seed=0)
    assert bool((source.emissions[:, :208] > 0).all())
    frequencies = source.pairs.sum(0)[:, None] * source.emissions
    ranked = frequencies.flatten().sort(descending=True).values
    assert (ranked[0] / ranked[48 * 10]).item() == pytest.approx(11**2, rel=0.05)


def test_optimum_counts_the_first_target_of_a_window_which_has_one_token_before_it() -> None:
    source = MarkovSource(vocab_size=10, seed=3)
    assert source.optimum(1) == source.bigram_entropy
    assert source.optimum(4) == pytest.approx((source.bigram_entropy + 3 * source.entropy_rate) / 4)


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 5, 47, 49, 1000])
def test_any_vocabulary_gives_tokens_inside_it_and_ordered_entropies(vocab_size: int) -> None:
    source = MarkovSource(vocab_size, seed=0)
    tokens = source.sample(5000)
    assert tokens.min() >= 0
    assert tokens.max() < vocab_size
    assert -1e-9 <= source.entropy_rate <= source.bigram_entropy + 1e-9
    assert source.bigram_entropy <= source.unigram_entropy + 1e-9 <= math.log(vocab_size) + 2e-9
    assert torch.allclose(source.transitions.sum(-1), torch.ones((), dtype=torch.float64))
    assert source.pairs.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("kind", [MarkovSource, UniformSource])
def test_a_seed_gives_the_same_stream_again_and_another_seed_another(
    kind: type[MarkovSource] | type[UniformSource],
) -> None:
    first, again, other = (kind(50, seed).sample(1000) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_uniform_source_has_the_entropy_of_its_vocabulary() -> None:
    source = UniformSource(64, seed=0)
    assert source.optimum(128) == source.unigram_entropy == math.log(64)
    assert estimate(source.sample(200_000).tolist(), 0) == pytest.approx(math.log(64), abs=0.01)

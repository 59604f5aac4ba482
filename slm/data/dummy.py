"""Dummy data: random sources of tokens whose entropy is known, so that a model's loss has a known floor.

All entropies are in nats per token. V vocabulary, C classes; a, b, c are the classes of three tokens in a row.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from slm.data.token_data import TokenData
from slm.errors import check

NUM_CLASSES = 48
NUM_KINDS = 4
FOLLOW = 0.95
ZIPF_EXPONENT = 2.0


class UniformSource:
    """Independent tokens, all equally likely: no honest model does better than ln V."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self.vocab_size = vocab_size
        self.generator = torch.Generator().manual_seed(seed)
        self.entropy_rate = self.bigram_entropy = self.unigram_entropy = math.log(vocab_size)

    def optimum(self, seq_len: int) -> float:
        """The lowest expected loss on windows of `seq_len` tokens."""
        return self.entropy_rate

    def best_accuracy(self, seq_len: int) -> float:
        """The highest expected accuracy on windows of `seq_len` tokens."""
        return 1.0 / self.vocab_size

    def sample(self, num_tokens: int) -> Tensor:
        """The next tokens (num_tokens,) of the stream."""
        return torch.randint(self.vocab_size, (num_tokens,), generator=self.generator)

    def surprise(self, tokens: Tensor) -> Tensor:
        """Minus the logarithm of the probability of each of some tokens (T,) but the first: (T - 1,), in nats."""
        return torch.full((len(tokens) - 1,), self.entropy_rate)


class MarkovSource:
    """A sparse second-order Markov chain over classes of tokens, in each of which frequencies follow Zipf's law.

    Token i belongs to class i % C, and a class to one of four kinds. After the classes a, b comes, with probability
    FOLLOW, the one class `rule[a, b]`, else any class. A class b has four successors by rule, and the kind of a says
    which of them it is: the last token alone tells a part of what can be known (`bigram_entropy`), the last two tell
    all of it (`entropy_rate`), so a model has to attend to the previous token.

    Args:
        vocab_size: V.
        seed: of the rule and of the sampled stream.
    """

    def __init__(self, vocab_size: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        num_kinds = min(NUM_KINDS, vocab_size)
        self.num_classes = min(NUM_CLASSES, vocab_size // num_kinds * num_kinds)
        self.rule = self._draw_rule(num_kinds)  # (C, C): a, b -> c
        likely = F.one_hot(self.rule, self.num_classes).double()
        self.transitions = FOLLOW * likely + (1 - FOLLOW) / self.num_classes  # (C, C, C): P(c | a, b)
        self.pairs = self._stationary_pairs()  # (C, C): P(a, b)

        ranks = torch.arange(math.ceil(vocab_size / self.num_classes))
        in_vocab = ranks * self.num_classes + torch.arange(self.num_classes)[:, None] < vocab_size
        weights = in_vocab * (ranks + 1.0).double() ** -ZIPF_EXPONENT
        self.emissions = weights / weights.sum(-1, keepdim=True)  # (C, V / C): P(token | its class), by rank

        classes = self.pairs.sum(0)  # (C,): P(b)
        self.after_one = torch.einsum("ab,abc->bc", self.pairs, self.transitions) / classes[:, None]  # (C, C): P(c | b)
        within = (classes * _entropy(self.emissions)).sum()
        self.entropy_rate = float((self.pairs * _entropy(self.transitions)).sum() + within)
        self.bigram_entropy = float((classes * _entropy(self.after_one)).sum() + within)
        self.unigram_entropy = float(_entropy(classes) + within)
        commonest = self.emissions[:, 0]
        self._accuracy_after_two = float((self.pairs * (self.transitions * commonest).amax(-1)).sum())
        self._accuracy_after_one = float((classes * (self.after_one * commonest).amax(-1)).sum())

    def optimum(self, seq_len: int) -> float:
        """The lowest expected loss on windows of `seq_len` tokens, whose first target has but one token before it."""
        return (self.bigram_entropy + (seq_len - 1) * self.entropy_rate) / seq_len

    def best_accuracy(self, seq_len: int) -> float:
        """The highest expected accuracy on windows of `seq_len` tokens."""
        return (self._accuracy_after_one + (seq_len - 1) * self._accuracy_after_two) / seq_len

    def sample(self, num_tokens: int) -> Tensor:
        """The next tokens (num_tokens,) of the stream, which starts in the stationary state."""
        generator, rule = self.generator, self.rule.tolist()
        a, b = divmod(int(self.pairs.flatten().multinomial(1, generator=generator)), self.num_classes)
        follows = torch.rand(num_tokens, generator=generator) < FOLLOW
        others = torch.randint(self.num_classes, (num_tokens,), generator=generator)
        path = []
        for follow, other in zip(follows.tolist(), others.tolist(), strict=True):
            a, b = b, rule[a][b] if follow else other
            path.append(b)
        classes = torch.tensor(path, dtype=torch.int64)
        ranks = torch.empty_like(classes)
        for number, emission in enumerate(self.emissions):
            of_class = classes == number
            count = int(of_class.sum())
            if count:
                ranks[of_class] = emission.multinomial(count, replacement=True, generator=generator)
        return ranks * self.num_classes + classes

    def surprise(self, tokens: Tensor) -> Tensor:
        """Minus the logarithm of the probability of each of some tokens (T,) but the first: (T - 1,), in nats.

        That is the probability after all tokens before it, of which the last two tell what can be known; of the second
        token it is that after the first, whatever came before. The mean over a window is what `optimum` expects.
        """
        classes, ranks = tokens % self.num_classes, tokens // self.num_classes
        a, b, c = classes[:-2], classes[1:-1], classes[2:]
        of_class = torch.cat([self.after_one[classes[:1], classes[1:2]], self.transitions[a, b, c]])
        return -(of_class * self.emissions[classes, ranks][1:]).log().float()

    def _draw_rule(self, num_kinds: int) -> Tensor:
        """The successor of a, b has the kind that those of a and b add up to; which class of it, is drawn for b.

        Every class then has as many predecessors of each kind, and the last token alone tells as little as it can.
        """
        blocks = self.num_classes // num_kinds
        drawn = torch.rand(num_kinds, num_kinds, blocks, generator=self.generator).argsort(-1)
        classes = torch.arange(self.num_classes)
        kind_a, kind_b = classes[:, None] % num_kinds, classes % num_kinds
        return drawn[kind_a, kind_b, classes // num_kinds] * num_kinds + (kind_a + kind_b) % num_kinds

    def _stationary_pairs(self) -> Tensor:
        pairs = torch.full_like(self.transitions[0], self.num_classes**-2)
        while True:
            following = torch.einsum("ab,abc->bc", pairs, self.transitions)
            if (following - pairs).abs().max() < 1e-15:
                return following
            pairs = following


def _entropy(probabilities: Tensor) -> Tensor:
    """Entropy over the last dimension, in nats; what has probability 0 adds nothing."""
    return torch.special.entr(probabilities).sum(-1)


class DummyData(TokenData):
    """Tokens from a source whose entropy is known, so the distance to the best possible loss is known too.

    Args:
        source: `markov`, a sparse second-order Markov chain with Zipf-like frequencies, or `uniform`,
            independent random tokens on which no honest model does better than ln V.
        num_tokens: length of the stream, made in memory from `seed`.
    """

    def __init__(
        self,
        *args: Any,
        source: Literal["markov", "uniform"] = "markov",
        num_tokens: int = 160_000,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check(num_tokens >= 1, f"num_tokens={num_tokens} must be at least 1")
        kind: type[MarkovSource | UniformSource] = MarkovSource if source == "markov" else UniformSource
        self.source = kind(self.hparams["vocab_size"], self.hparams["seed"])
        self.optimum = self.source.optimum(self.hparams["max_seq_len"])
        self.best_accuracy = self.source.best_accuracy(self.hparams["max_seq_len"])
        self.unigram = self.source.unigram_entropy

    def stream(self) -> Tensor:
        return self.source.sample(self.hparams["num_tokens"])

"""What a network does with a sequence, against what is known of it otherwise."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, SMALL_FLAGS, UNSHOWN, small_model
from torch import Tensor, nn

from slm.cli import main
from slm.data.dummy import MarkovSource, UniformSource
from slm.errors import InputError
from slm.formats.hugging_face import as_transformers
from slm.model.insight import attention, layer_logits, next_logits, read, surprise
from slm.model.transformer import Block, CausalSelfAttention, KVCache, Transformer
from slm.run.checkpoint import open_checkpoint
from slm.run.loading import first_network
from slm.training.language_model import LanguageModel

FAMILIES = [{}, {"architecture": "llama", "num_heads": 4, "num_kv_heads": 2}, {"tie_embeddings": False}]


def moved_away(**options: Any) -> Transformer:
    """A network of two blocks whose weights are no longer so small that all is alike."""
    transformer = small_model(num_layers=2, **options).transformer.eval()
    for parameter in transformer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return transformer


@pytest.mark.parametrize("options", FAMILIES)
def test_surprise_is_the_cross_entropy_of_the_networks_own_forward(options: dict[str, Any]) -> None:
    transformer = moved_away(max_seq_len=150, **options)
    tokens = torch.randint(20, (150,))  # more than are computed at once
    found = surprise(transformer, read(transformer, tokens))
    logits = transformer.logits(transformer(tokens[None]))[0, :-1]
    torch.testing.assert_close(found.nats, F.cross_entropy(logits, tokens[1:], reduction="none"))
    order = logits.argsort(-1, descending=True)
    assert found.ranks.tolist() == ((order == tokens[1:, None]).nonzero()[:, 1] + 1).tolist()


def test_one_token_surprises_nobody() -> None:
    transformer = moved_away()
    found = surprise(transformer, read(transformer, torch.tensor([3])))
    assert (len(found.nats), len(found.ranks)) == (0, 0)


@pytest.mark.parametrize("options", FAMILIES)
def test_what_a_layer_would_say_is_what_a_network_of_so_many_says(options: dict[str, Any]) -> None:
    transformer = moved_away(**options)
    tokens = torch.arange(9)
    found = layer_logits(transformer, read(transformer, tokens), 4)
    blocks = transformer.blocks
    for number in range(3):
        transformer.blocks = blocks[:number]
        expected = transformer.logits(transformer(tokens[None]))[0, 4]
        torch.testing.assert_close(found[number], expected)
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[1], found[2])


class Ended(Transformer):
    """A network that does something after its blocks that nobody can know of."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


class Scaled(Transformer):
    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        return 3 * super().embed(tokens, start)

    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden).tanh()


def test_what_layers_would_say_is_refused_where_it_cannot_be_known() -> None:
    transformer = Ended(**SMALL).eval()
    with pytest.raises(InputError, match="does more after its blocks"):
        layer_logits(transformer, read(transformer, torch.arange(5)), 2)


def test_a_network_of_ones_own_is_read_as_it_computes() -> None:
    transformer = Scaled(**SMALL).eval()
    tokens = torch.arange(5)
    logits = transformer.logits(transformer(tokens[None]))[0]
    reading = read(transformer, tokens)
    torch.testing.assert_close(layer_logits(transformer, reading, 2)[-1], logits[2])
    torch.testing.assert_close(
        surprise(transformer, reading).nats, F.cross_entropy(logits[:-1], tokens[1:], reduction="none")
    )
    torch.testing.assert_close(reading.stream[0], transformer.embed(tokens[None])[0])


def test_logits_that_are_not_finite_are_refused() -> None:
    transformer = moved_away()
    transformer.final_norm.weight.data[0] = math.nan
    reading = read(transformer, torch.arange(5))
    for ask in (
        surprise,
        lambda *given: layer_logits(*given, 4),
        lambda *given: next_logits(given[0], given[1].hidden),
    ):
        with pytest.raises(InputError, match="logits are not finite"):
            ask(transformer, reading)


@pytest.mark.parametrize("options", FAMILIES)
def test_what_a_layer_gives_is_what_it_attends_to(options: dict[str, Any]) -> None:
    transformer = moved_away(**options)
    tokens = torch.randint(20, (11,))
    outputs: list[Tensor] = []
    for block in transformer.blocks:
        block.attn.register_forward_hook(lambda layer, given, output: outputs.append(output))
    reading = read(transformer, tokens)
    for number, ((layer, x), output) in enumerate(zip(reading.inputs, outputs, strict=True)):
        weights = reading.attention(number)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
        _, _, v = layer.heads(x)
        values = v[0].repeat_interleave(layer.num_heads // layer.num_kv_heads, dim=0)  # (H, T, D / H)
        torch.testing.assert_close(layer.out((weights @ values).transpose(0, 1).flatten(1)), output[0])


def test_attention_is_that_of_the_network() -> None:
    transformer = small_model(num_layers=2, dropout=0.5).transformer
    transformer.blocks[1].eval()
    before = {module: module.training for module in transformer.modules()}, torch.get_rng_state()
    tokens = torch.arange(6)
    found = attention(transformer, tokens)
    assert {module: module.training for module in transformer.modules()} == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    transformer.eval()
    x = transformer.token_embedding(tokens) + transformer.position_embedding.weight[:6]
    for block, weights in zip(transformer.blocks, found, strict=True):
        q, k, v = block.attn.qkv(block.attn_norm(x)).view(6, 3, 2, 8).permute(1, 2, 0, 3)  # (H, T, D / H) each
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(weights @ v, expected)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6))
        assert weights.triu(1).abs().max() == 0
        x = block(x[None])[0]


@pytest.mark.parametrize("options", [{}, {"architecture": "llama", "num_heads": 4, "num_kv_heads": 2}])
def test_attention_is_what_hugging_face_computes(options: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    model = small_model(num_layers=2, **options).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    theirs = as_transformers(model, None)
    theirs.set_attn_implementation("eager")
    tokens = torch.arange(6)
    expected = theirs(tokens[None], output_attentions=True).attentions
    for ours, other in zip(attention(model.transformer, tokens), expected, strict=True):
        torch.testing.assert_close(ours, other[0], atol=1e-5, rtol=1e-4)


def test_attention_is_found_in_any_network_that_has_it() -> None:
    network = nn.Sequential(nn.Embedding(20, 16), nn.Sequential(Block(16, 4, 32, 0.0)), Block(16, 2, 32, 0.0))
    assert [weights.shape for weights in attention(network, torch.arange(5))] == [(4, 5, 5), (2, 5, 5)]
    assert attention(nn.Embedding(20, 16), torch.arange(5)) == []


def test_a_part_of_the_attention_is_that_part_of_all_of_it() -> None:
    reading = read(moved_away(architecture="llama", num_heads=4, num_kv_heads=2), torch.randint(20, (11,)))
    torch.testing.assert_close(reading.attention(1, 4, 9), reading.attention(1)[:, 4:9, :9])


def test_attention_of_a_kind_of_its_own_is_not_shown_as_if_it_were_ours() -> None:
    class Blind(CausalSelfAttention):
        def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
            return self.out(x)

    network = nn.Sequential(nn.Embedding(20, 16), Blind(16, 4, 0.0), CausalSelfAttention(16, 2, 0.0))
    assert [weights.shape for weights in attention(network, torch.arange(5))] == [(2, 5, 5)]


def test_blocks_may_be_called_with_names() -> None:
    class Naming(Transformer):
        def forward(self, tokens: Tensor, caches: list[KVCache] | None = None) -> Tensor:
            x = self.embed(tokens)
            for block in self.blocks:
                x = block(x=x)
            return self.final_norm(x)

    transformer, tokens = Naming(**SMALL).eval(), torch.arange(5)
    reading = read(transformer, tokens)
    assert len(reading.stream) == 1 + len(transformer.blocks)
    logits = transformer.logits(transformer(tokens[None]))[0]
    torch.testing.assert_close(layer_logits(transformer, reading, 2)[-1], logits[2])


def test_an_error_leaves_the_network_as_it_was() -> None:
    transformer = small_model().transformer
    with pytest.raises(InputError, match="longer than max_seq_len=16"):
        attention(transformer, torch.zeros(17, dtype=torch.long))
    assert transformer.training
    assert not any(module._forward_pre_hooks for module in transformer.modules())


def test_the_markov_source_gives_each_token_the_probability_by_which_it_draws_it() -> None:
    source = MarkovSource(60, seed=1)
    tokens = source.sample(50)
    first, expected = source.surprise(tokens), []
    for place in range(1, 50):
        token, b = int(tokens[place]), int(tokens[place - 1]) % 48
        before = range(48) if place == 1 else [int(tokens[place - 2]) % 48]  # all that may have been there
        shares = source.pairs[list(before), b] / source.pairs[list(before), b].sum()
        rule = [0.95 * (source.rule[a, b] == token % 48) + 0.05 / 48 for a in before]
        of_class = sum(share * follows for share, follows in zip(shares, rule, strict=True))
        weights = {rank: (rank + 1.0) ** -2 for rank in range(2) if 48 * rank + token % 48 < 60}
        expected.append(-math.log(of_class * weights[token // 48] / sum(weights.values())))
    torch.testing.assert_close(first, torch.tensor(expected))
    assert source.surprise(tokens[:1]).shape == (0,)


def test_the_sources_own_surprise_is_on_average_its_entropy() -> None:
    source = MarkovSource(1000, seed=0)
    tokens = source.sample(200_000)
    nats = source.surprise(tokens)
    assert nats.mean().item() == pytest.approx(source.entropy_rate, abs=4 * nats.std().item() / 200_000**0.5)
    first = torch.cat([source.surprise(pair) for pair in tokens.view(-1, 20)[:, :2]])
    assert first.mean().item() == pytest.approx(source.bigram_entropy, abs=4 * first.std().item() / 10_000**0.5)
    total = sum(source.surprise(torch.tensor([5, 17, token])).neg().exp()[1] for token in range(1000))
    assert total == pytest.approx(1.0, abs=1e-5)


def test_no_token_of_the_uniform_source_is_less_of_a_surprise_than_another() -> None:
    assert UniformSource(20, seed=0).surprise(torch.tensor([1, 5, 5])).tolist() == pytest.approx([math.log(20)] * 2)


@pytest.mark.parametrize("options", [[], ["--model.architecture=llama", "--model.tie_embeddings=false"]])
def test_the_first_weights_are_bit_for_bit_those_that_a_run_began_with(
    options: list[str], workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: dict[str, Tensor] = {}
    usual = LanguageModel.on_train_start

    def note(model: LanguageModel) -> None:
        begun.update({name: value.clone() for name, value in model.transformer.state_dict().items()})
        usual(model)

    monkeypatch.setattr(LanguageModel, "on_train_start", note)
    flags = ["--seed_everything=7", "--trainer.max_steps=2", "--trainer.enable_progress_bar=false", *options]
    main([*SMALL_FLAGS, *UNSHOWN, *flags])
    random_numbers = torch.get_rng_state()
    path, content = open_checkpoint("last")
    found = first_network(path, content, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert found.keys() == begun.keys()
    assert all(torch.equal(found[name], begun[name]) for name in begun)
    trained = content["state_dict"]
    assert not torch.equal(trained["transformer.token_embedding.weight"], begun["token_embedding.weight"])
    assert not torch.equal(first_network(path, content, seed=8).token_embedding.weight, begun["token_embedding.weight"])

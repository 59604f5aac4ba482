"""What a model goes on with on the page, from any place of it, against what `slm.generate` writes."""

import math
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RHYME, small_model

from slm.errors import InputError
from slm.model.sampling import Sampler, decode
from slm.page.checkpoints import Checkpoint
from slm.page.continuation import Continuation, Place, Settings, drawn_from

EVEN = Settings(1.0, None, 1.0)
START = Place((3, 5, 17), (), 0)


class UnwantedError(Exception):
    """Raised where a token is no longer wanted."""


def numbers_model(path: Path, **options: Any) -> Checkpoint:
    """A checkpoint of numbers, with weights that were moved, so that it does not always say the same."""
    torch.manual_seed(0)
    model = small_model(num_layers=2, **options)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    torch.save({"hyper_parameters": dict(model.hparams), "state_dict": model.transformer.state_dict()}, path)
    return Checkpoint(path, "cpu")


def never() -> None:
    """Nothing is ever superseded."""


def write(continuation: Continuation, place: Place, num_tokens: int, settings: Settings) -> list[int]:
    """So many tokens from a place on."""
    for _ in range(num_tokens):
        place = replace(place, written=(*place.written, continuation.next(place, settings).token))
    return list(place.written)


@pytest.mark.parametrize("options", [{}, {"architecture": "llama"}])
@pytest.mark.parametrize("settings", [EVEN, Settings(0.7, 5, 0.9), Settings(0.0, None, 1.0)])
def test_what_is_written_is_what_generate_writes(options: dict[str, str], settings: Settings, tmp_path: Path) -> None:
    checkpoint = numbers_model(tmp_path / "numbers.pt", **options)
    sampler = Sampler(*settings, seed=4)
    tokens = torch.tensor([START.prompt])
    expected = torch.cat(list(islice(decode(checkpoint.model.transformer, tokens, sampler), 30))).tolist()
    assert write(Continuation(checkpoint, never), replace(START, seed=4), 30, settings) == expected


@pytest.mark.parametrize("options", [{}, {"architecture": "llama"}])
@pytest.mark.parametrize("length", [0, 1, 8, 25])
def test_a_place_has_the_same_text_however_one_comes_there(
    options: dict[str, str], length: int, tmp_path: Path
) -> None:
    checkpoint = numbers_model(tmp_path / "numbers.pt", **options)  # whose context is 16
    whole = write(Continuation(checkpoint, never), START, 40, EVEN)
    assert len({*whole[25:]}) > 3
    continuation = Continuation(checkpoint, never)
    write(continuation, START, 30, EVEN)
    assert write(continuation, replace(START, written=tuple(whole[:length])), 40 - length, EVEN) == whole


def test_another_token_or_seed_makes_another_text_and_a_temperature_of_0_takes_a_random_number_too(
    tmp_path: Path,
) -> None:
    checkpoint = numbers_model(tmp_path / "numbers.pt")
    continuation = Continuation(checkpoint, never)
    start = replace(START, written=tuple(write(continuation, START, 5, Settings(0.0, None, 1.0))))
    text = write(continuation, start, 8, EVEN)
    for other in (replace(start, seed=1), replace(start, written=(*start.written[:4], (start.written[4] + 1) % 20))):
        assert write(continuation, other, 8, EVEN)[5:] != text[5:]
    assert write(Continuation(checkpoint, never), start, 8, EVEN) == text


@pytest.mark.parametrize("options", [{}, {"architecture": "llama"}])
@pytest.mark.parametrize("length", [6, 25])
def test_what_was_begun_and_is_not_wanted_changes_nothing(options: dict[str, str], length: int, tmp_path: Path) -> None:
    checkpoint, is_wanted = numbers_model(tmp_path / "numbers.pt", **options), True

    def check() -> None:
        if not is_wanted:
            raise UnwantedError

    num_tokens = length + 6
    whole = write(Continuation(checkpoint, never), START, num_tokens, EVEN)
    continuation = Continuation(checkpoint, check)
    place = replace(START, written=tuple(write(continuation, START, length, EVEN)))
    continuation.next(place, EVEN)  # is thrown away
    for other in (place, replace(place, seed=7), START):
        is_wanted = False
        with pytest.raises(UnwantedError):
            continuation.next(other, EVEN)
        is_wanted = True
        assert write(continuation, place, num_tokens - length, EVEN) == whole


def test_after_an_error_it_can_be_asked_again(rhyming: Path) -> None:
    checkpoint = Checkpoint(rhyming, "cpu")
    continuation, weight = Continuation(checkpoint, never), checkpoint.model.transformer.final_norm.weight.data
    settings, kept = Settings(0.0, None, 1.0), weight.clone()
    start = Place(tuple(b"one two three f"), (), 0)
    place = replace(start, written=tuple(write(continuation, start, 3, settings)))
    weight.fill_(math.nan)
    for _ in range(2):
        with pytest.raises(InputError, match="not finite"):
            continuation.next(place, settings)
    weight.copy_(kept)
    assert bytes(write(continuation, place, 5, settings)) == (RHYME * 2).encode()[15:23]


def test_alternatives_have_the_models_probability_and_the_one_that_is_drawn_from(tmp_path: Path) -> None:
    checkpoint = numbers_model(tmp_path / "numbers.pt")
    choice = Continuation(checkpoint, never).next(START, Settings(0.5, 3, 1.0))
    with torch.no_grad():
        logits = checkpoint.model.transformer.logits(checkpoint.model.transformer(torch.tensor([START.prompt])))[0, -1]
    likeliest = logits.softmax(-1).sort(descending=True)
    drawn = (logits / 0.5)[likeliest.indices[:3]].softmax(-1)
    assert list(choice.alternatives) == likeliest.indices[:10].tolist()
    owns, drawns = zip(*choice.alternatives.values(), strict=True)
    assert owns == pytest.approx(likeliest.values[:10].tolist(), rel=1e-4)
    assert drawns == pytest.approx([*drawn.tolist(), *[0.0] * 7], rel=1e-4)


def test_only_tokens_that_the_tokenizer_has_are_drawn(rhyming: Path, tmp_path: Path) -> None:
    content = torch.load(rhyming, weights_only=True)
    model = small_model(vocab_size=300)
    content.update(hyper_parameters=dict(model.hparams), state_dict=model.transformer.state_dict())
    torch.save(content, tmp_path / "larger.pt")
    checkpoint, logits = Checkpoint(tmp_path / "larger.pt", "cpu"), torch.arange(300.0) / 100
    found = drawn_from(checkpoint, Sampler(1.0), logits)
    torch.testing.assert_close(found[:256], logits[:256].softmax(-1))
    assert found[256:].tolist() == [0.0] * 44
    assert drawn_from(checkpoint, Sampler(0.0), logits)[255] == 1.0

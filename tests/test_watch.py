"""TensorBoard shows what the model writes, attends to and embeds, and the run is the same as without."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_FLAGS, small_model
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slm.data.text_stream import Numbers
from slm.data.tokenizer import ByteTokenizer
from slm.watch import tensorboard as watch
from slm.watch.curves import read_curves
from slm.watch.drawing import CELL, Line, attention_image, loss_chart, ticks
from slm.watch.report import losses
from slm.watch.tensorboard import attention, label

Run = Callable[..., str]
RUN = Path("runs/version_0")
FLAGS = [*SMALL_FLAGS, "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"]
TEXT = ["--config", str(ROOT / "configs/text.yaml"), "--model.vocab_size=256"]
OFF = [f"--watch.{name}=false" for name in ("samples", "attention", "embedding", "loss_figure")]


def shown(run: Path = RUN) -> EventAccumulator:
    return EventAccumulator(str(run)).Reload()


def test_a_run_shows_samples_attention_embedding_and_losses(slm: Run) -> None:
    slm(*FLAGS)
    events = shown()
    assert sorted(events.Tags()["images"]) == ["attention/layer_1", "losses"]
    [tensors] = [tag for tag in events.Tags()["tensors"] if tag.startswith("samples")]
    text = events.Tensors(tensors)[0].tensor_proto.string_val[0].decode()
    assert text.count("It goes on from") == watch.NUM_PROMPTS
    numbers = [re.findall(r"\d+", line) for line in re.findall(r"^    (.+)$", text, re.M)]
    assert [len(line) for line in numbers] == [16, 64] * watch.NUM_PROMPTS
    assert "losses      runs/version_0/loss.png" in slm("--ckpt_path=last", "--trainer.max_epochs=3")
    assert Image.open(RUN / "loss.png").size == (640, 440)


def test_the_embedding_is_that_of_the_tokens_held_out(slm: Run) -> None:
    slm(*FLAGS)
    names = [line.split("\t") for line in next(RUN.glob("*/token_embedding/metadata.tsv")).read_text().splitlines()]
    rows = np.loadtxt(next(RUN.glob("*/token_embedding/tensors.tsv")))
    assert names[0] == ["token", "times held out"]
    counts = [int(count) for _, count in names[1:]]
    assert counts == sorted(counts, reverse=True)
    state = torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    weights = state["transformer.token_embedding.weight"]
    assert rows == pytest.approx(weights[[int(token) for token, _ in names[1:]]].numpy(), abs=1e-6)


def test_each_can_be_switched_off_and_changes_nothing_in_the_run(slm: Run) -> None:
    slm(*FLAGS)
    output = slm(*FLAGS, *OFF)
    other = Path("runs/version_1")
    events = shown(other)
    assert events.Tags()["images"] == []
    assert not any(tag.startswith("samples") for tag in events.Tags()["tensors"])
    assert not [*other.glob("*.png"), *other.rglob("*.tsv")]
    assert "losses" not in output
    speeds = ("train/tokens_per_second",)
    ours, theirs = ({k: v for k, v in read_curves(run).items() if k not in speeds} for run in (RUN, other))
    assert ours == theirs
    states = [torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (RUN, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_validation_is_passed_over_where_watching_would_take_too_long(
    slm: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LARGEST_SHARE_OF_TIME", 1e9)
    slm(*FLAGS)
    monkeypatch.setattr(watch, "LARGEST_SHARE_OF_TIME", 1e-9)
    slm(*FLAGS)
    counts = [len(shown(run).Images("attention/layer_1")) for run in (RUN, Path("runs/version_1"))]
    assert counts == [2, 1]


def test_attention_is_that_of_the_network() -> None:
    transformer = small_model(num_layers=2).transformer
    tokens = torch.arange(6)
    found = attention(transformer, tokens)
    assert transformer.training
    block = transformer.blocks[0]
    x = transformer.token_embedding(tokens) + transformer.position_embedding.weight[:6]
    q, k, v = block.attn.qkv(block.attn_norm(x)).view(6, 3, 2, 8).permute(1, 2, 0, 3)  # (H, T, D / H) each
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(found[0].clone() @ v, expected)
    assert len(found) == 2
    for weights in (part.clone() for part in found):
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6))
        assert weights.triu(1).abs().max() == 0


@pytest.mark.parametrize(
    ("token", "expected"), [(0x61, "a"), (0x20, "_"), (0x0A, "\\n"), (0xC3, "\\xc3"), (0xFF, "<end>"), (0, "\\x00")]
)
def test_bytes_have_names_in_ascii(token: int, expected: str) -> None:
    assert label(ByteTokenizer(), token) == expected


def test_numbers_are_their_own_names() -> None:
    assert label(Numbers(20), 17) == "17"


def test_the_image_of_attention_is_dark_where_the_weight_is() -> None:
    weights = torch.zeros(2, 3, 3)
    weights[1, 2, 0] = 1.0
    image = np.asarray(attention_image(weights, ["a", "b", "c"], "layer 1"))
    dark = np.argwhere((image == [26, 115, 232]).all(-1))
    assert len(dark) == CELL**2
    assert dark[:, 1].min() > image.shape[1] // 2  # the second head's
    frame = np.argwhere((image == [95, 99, 104]).all(-1))
    bottom, left = frame[:, 0].max(), frame[frame[:, 1] > image.shape[1] // 2][:, 1].min()
    assert (dark[:, 0].max(), dark[:, 1].min()) == (bottom - 1, left + 1)  # last row, first column


def test_a_chart_draws_finite_points_and_marks_what_it_is_told() -> None:
    points = [(0, 9.0), (50, float("nan")), (99, 2.0)]
    plain = np.asarray(loss_chart("run", [Line("training", "#8ab4f8", points)], None, []))
    marked = np.asarray(loss_chart("run", [Line("training", "#8ab4f8", points)], 2.5, [60]))
    purple, green = ([147, 52, 230], [24, 128, 56])
    assert not (plain == purple).all(-1).any()
    columns = np.argwhere((marked == purple).all(-1)[70:])[:, 1]
    assert columns.mean() == pytest.approx(64 + (640 - 84) * 60 / 99, abs=2)
    assert (marked == green).all(-1).any()
    loss_chart("run", [Line("training", "#8ab4f8", [])], None, [])
    loss_chart("run", [Line("training", "#8ab4f8", [(0, 3.0)])], None, [])


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, 179, [0, 20]), (1.5, 9.5, [2, 4]), (2.31, 2.34, [2.31, 2.315])]
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    found = ticks(low, high)
    assert found[:2] == expected
    assert 4 <= len(found) <= 11


def test_a_fall_of_the_rate_is_marked_at_the_validation_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("slm.watch.report.loss_chart", lambda *arguments: seen.append(arguments[3]))
    curves = {"val/loss": [(14, 2.0), (29, 2.0)], "lr": [(9, 1e-3), (19, 1e-3), (39, 5e-4), (49, 5e-4)]}
    losses("run", curves, None, True)
    losses("run", curves, None, False)
    assert seen == [[29], []]

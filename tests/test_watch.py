"""TensorBoard shows what the model writes, attends to and embeds, and the run is the same as without."""

import ast
import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_FLAGS, UNSHOWN, fit, small_data, small_model
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slm.data.text_stream import Numbers
from slm.data.tokenizer import ByteTokenizer
from slm.watch import tensorboard as watch
from slm.watch.pictures import attention_figure, loss_figure
from slm.watch.tensorboard import Watch, Watcher, label, read_curves

Run = Callable[..., str]
RUN = Path("runs/version_0")
FLAGS = [*SMALL_FLAGS, "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"]
TEXT = ["--config", str(ROOT / "configs/text.yaml"), "--model.vocab_size=256"]


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything fits into the time budget."""
    monkeypatch.setattr(watch, "LARGEST_SHARE_OF_TIME", 1e9)


def shown(run: Path = RUN) -> EventAccumulator:
    return EventAccumulator(str(run)).Reload()


def test_a_run_shows_samples_attention_embedding_and_losses(slm: Run, unhurried: None) -> None:
    slm(*FLAGS)
    events = shown()
    assert sorted(events.Tags()["images"]) == ["attention/layer_1", "losses"]
    [tensors] = [tag for tag in events.Tags()["tensors"] if tag.startswith("samples")]
    text = events.Tensors(tensors)[0].tensor_proto.string_val[0].decode()
    assert text.count("It goes on from") == watch.NUM_PROMPTS
    numbers = [re.findall(r"\d+", line) for line in re.findall(r"^    (.+)$", text, re.M)]
    assert [len(line) for line in numbers] == [16, 64] * watch.NUM_PROMPTS
    assert "losses      runs/version_0/loss.png" in slm("--ckpt_path=last", "--trainer.max_epochs=3")
    assert imread(RUN / "loss.png").shape == (440, 640, 4)


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


@pytest.mark.slow
def test_each_can_be_switched_off_and_changes_nothing_in_the_run(slm: Run, unhurried: None) -> None:
    slm(*FLAGS)
    assert len(shown().Images("attention/layer_1")) == 2
    output = slm(*FLAGS, *UNSHOWN)
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


@pytest.mark.parametrize(
    ("seconds_per_epoch", "samples_at", "attention_at"), [(100.0, [1, 4, 6], [1, 6]), (2.0, [1], [])]
)
def test_what_would_exceed_the_time_budget_is_skipped(
    seconds_per_epoch: float,
    samples_at: list[int],
    attention_at: list[int],
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Clock(Callback):
        now = 100.0

        def monotonic(self) -> float:
            return self.now

        def on_validation_start(self, *_: Any) -> None:
            self.now += seconds_per_epoch

    def taking(seconds: float, show: watch.Show) -> watch.Show:
        def show_slowly(*arguments: Any) -> None:
            clock.now += seconds
            show(*arguments)

        return show_slowly

    clock = Clock()
    monkeypatch.setattr(watch, "time", clock)
    monkeypatch.setattr(watch, "_show_samples", taking(0.55, watch._show_samples))
    monkeypatch.setattr(watch, "_show_attention", taking(0.8, watch._show_attention))
    watcher = Watcher(Watch(embedding=False))
    flags = {"max_epochs": 6, "limit_train_batches": 1, "limit_val_batches": 1}
    fit(small_model(), small_data(), callbacks=[clock, watcher], logger=TensorBoardLogger(".", "", ""), **flags)
    events = shown(Path())
    assert [point.step for point in events.Tensors("samples/text_summary")] == samples_at
    assert ("attention/layer_1" in events.Tags()["images"]) == bool(attention_at)
    if attention_at:
        assert [point.step for point in events.Images("attention/layer_1")] == attention_at


@pytest.mark.parametrize(
    ("token", "expected"), [(0x61, "a"), (0x20, "_"), (0x0A, "\\n"), (0xC3, "\\xc3"), (0xFF, "<end>"), (0, "\\x00")]
)
def test_bytes_have_names_in_ascii(token: int, expected: str) -> None:
    assert label(ByteTokenizer(), token) == expected


def test_numbers_are_their_own_names() -> None:
    assert label(Numbers(20), 17) == "17"


def drawn(figure: Figure) -> np.ndarray:
    """The figure's pixels; a warning is an error."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(file, format="png")
    file.seek(0)
    return imread(file)


def test_each_head_has_its_map_with_the_tokens_beside_it() -> None:
    weights = torch.rand(3, 4, 4).tril()
    tokens = ["$", "$x_$", "\\alpha", "12345678"]
    figure = attention_figure(weights, tokens, "layer 1")
    assert [axes.get_xlabel() for axes in figure.axes] == ["head 1", "head 2", "head 3"]
    for axes, expected in zip(figure.axes, weights, strict=True):
        [image] = axes.images
        assert np.array_equal(image.get_array(), expected)
        assert image.get_clim() == (0, 1)
    rows = [[text.get_text() for text in axes.get_yticklabels()] for axes in figure.axes]
    columns = [[text.get_text() for text in axes.get_xticklabels()] for axes in figure.axes]
    assert rows == [tokens, [], tokens]
    assert columns == [tokens, tokens, []]
    assert drawn(figure).ndim == 3


def test_maps_are_white_where_nothing_is_attended_to_and_have_square_cells() -> None:
    weights = torch.zeros(1, 16, 16)
    weights[0, 15, 0] = 1.0
    pixels = drawn(attention_figure(weights, ["a"] * 16, "layer 1"))[..., :3]
    dark = np.argwhere(pixels[..., 2] - pixels[..., 0] > 0.3)
    height, width = np.ptp(dark, axis=0) + 1
    assert 14 <= height <= 17
    assert abs(height - width) <= 1
    assert dark[:, 0].min() > pixels.shape[0] * 0.8  # the last row
    assert dark[:, 1].max() < pixels.shape[1] * 0.25  # the first column


def test_the_figure_of_losses_shows_the_curves_and_the_optimum() -> None:
    curves = {"train/loss": [(0, 9.0), (50, float("nan")), (99, 2.0)], "val/loss": [(60, 3.0), (99, float("inf"))]}
    figure = loss_figure("run $1 \u65e5\u672c\n", curves, 1.5, False)
    [axes] = figure.axes
    training, validation, optimum = axes.lines
    assert np.array_equal(training.get_xydata(), curves["train/loss"], equal_nan=True)
    assert np.array_equal(validation.get_xydata(), curves["val/loss"])
    assert list(optimum.get_ydata()) == [1.5, 1.5]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["training", "validation", "optimum 1.500"]
    assert axes.get_title("left") == r"run $1 \u65e5\u672c\n"
    assert drawn(figure).shape == (440, 640, 4)
    low, high = axes.get_ylim()
    assert low < 1.5 < 9.0 < high < 10.0


@pytest.mark.parametrize("points", [[], [(0, 3.0)]])
def test_losses_of_a_step_or_of_none_can_be_drawn(points: list[tuple[int, float]]) -> None:
    plain = drawn(loss_figure("run", {}, None, True))
    pixels = drawn(loss_figure("run", {"train/loss": points}, None, True))
    middle = (slice(150, 300), slice(200, 400))
    assert (np.ptp(pixels[middle][..., 2] - pixels[middle][..., 0]) > 0.2) == bool(points)  # a blue dot
    assert plain.shape == pixels.shape


@pytest.mark.parametrize(("is_plateau", "expected"), [(True, [29, 44]), (False, [])])
def test_a_fall_of_the_rate_is_marked_at_the_validation_before_it(is_plateau: bool, expected: list[int]) -> None:
    rates = [(9, 1e-3), (19, 1e-3), (39, 5e-4), (49, 2.5e-4)]
    curves = {"val/loss": [(14, 2.0), (29, 2.0), (44, 2.0)], "lr": rates}
    [axes] = loss_figure("run", curves, None, is_plateau).axes
    marks = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in marks] == expected
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["training", "validation"] + ["learning rate falls"] * is_plateau


def test_matplotlib_is_imported_when_the_first_figure_is_drawn() -> None:
    for file in (ROOT / "slm").rglob("*.py"):
        tree = ast.parse(file.read_text())
        imports = "\n".join(ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
        assert file.name == "pictures.py" or not re.search("matplotlib|pictures", imports), file

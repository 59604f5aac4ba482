"""A run that is stopped anywhere and resumed ends with the same bits as one that ran through.

The stops are exceptions out of hooks, in this process; `stress.py` stops real processes.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stress
import tensorboard.summary.writer.event_file_writer as event_files
import torch
from conftest import SMALL_FLAGS, slow_after_first
from lightning.pytorch import Callback, Trainer
from stress import compare, ending
from torch.optim.lr_scheduler import ReduceLROnPlateau

import slm.command.trainer
from slm.cli import main
from slm.data import DummyData
from slm.run.resume import ExactResume

FLAGS = [
    *SMALL_FLAGS, "--data.num_tokens=2300", "--data.batch_size=8", "--model.dropout=0.1", "--model.plateau_patience=0",
    "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1",
    "--trainer.accelerator=cpu", "--model.learning_rate=0.1",
]  # fmt: skip
"""17 batches an epoch."""
SETTINGS = {
    "epochs": [],
    "validations": ["--trainer.val_check_interval=4", "--data.num_workers=1"],
    "partial windows": ["--trainer.accumulate_grad_batches=3", "--trainer.precision=32-true"],
    "validations between windows": ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=4"],
    "steps": ["--trainer.max_epochs=-1", "--trainer.max_steps=34", "--model.optimizer=sgd"],
    "validations across epochs": ["--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=7"],
    "limited epochs": ["--trainer.max_epochs=4", "--trainer.limit_train_batches=7", "--trainer.val_check_interval=3"],
    "muon and cosine": ["--model.optimizer=muon", "--model.schedule=cosine", "--model.warmup_steps=3"],
    "short context": ["--model.short_context_steps=20", "--data.shift_windows=true"],
    "overfitting": ["--trainer.max_epochs=6", "--trainer.overfit_batches=5"],
}  # fmt: skip
AT_BATCHES = [
    "on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end",
    "on_validation_batch_start", "on_validation_batch_end",
]  # fmt: skip
SELDOM = [
    "on_train_start", "on_train_epoch_start", "on_train_epoch_end", "on_validation_start", "on_validation_epoch_end",
    "on_validation_end",
]  # fmt: skip
BOUNDARY = [
    ("on_train_batch_end", 16),
    ("on_train_epoch_end", 0),
    ("on_train_batch_start", 0),
    ("on_after_backward", 2),
]
"""The last batch of the first epoch, its end, and the beginning of the second."""


class Stopped(Exception):  # noqa: N818 - no error
    pass


class Bomb(Callback):
    """Raises in a hook when it is called for the n-th time; draws random numbers of every kind, in validations too."""

    hook, left = "", 0
    drawn: dict[tuple[str, int, int], tuple[float, ...]] = {}  # noqa: RUF012 - a new one for each run

    def strike(self, hook: str, trainer: Trainer, arguments: tuple[Any, ...]) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if hook == self.hook:
            Bomb.left -= 1
            if self.left < 0:
                raise Stopped(hook)
        if hook in ("on_train_batch_end", "on_validation_batch_end"):
            when = (hook, trainer.fit_loop.epoch_loop.batch_progress.total.ready, arguments[3])
            self.drawn[when] = random.random(), np.random.rand(), torch.rand(()).item()


def _striking(hook: str) -> Callable[..., None]:
    return lambda self, trainer, *arguments: self.strike(hook, trainer, arguments)


for _hook in (*AT_BATCHES, *SELDOM):
    setattr(Bomb, _hook, _striking(_hook))


class Demanding(ReduceLROnPlateau):
    """Lowers the learning rate unless the loss is halved, so that it falls in these runs on every machine."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, threshold=0.5, **kwargs)


@pytest.fixture(autouse=True)
def bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives every run the bomb, a schedule that moves, and event files of one second names that sort by age."""
    monkeypatch.setattr("slm.training.language_model.ReduceLROnPlateau", Demanding)
    monkeypatch.setattr(event_files, "_global_uid", event_files.AtomicCounter(10_000))
    built = slm.command.trainer._callbacks
    monkeypatch.setattr(slm.command.trainer, "_callbacks", lambda *args: [*built(*args), Bomb()])


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, settings: str, stops: list[tuple[str, int]]) -> Path:
    """One run in a folder, stopped at each of these hooks, to its end."""
    folder.mkdir()
    Bomb.drawn = {}
    monkeypatch.chdir(folder)
    for hook, number in [*stops, ("", 0)]:
        Bomb.hook, Bomb.left = hook, number
        argv = stress.RESUME if stress.RUN.is_dir() else [*FLAGS, *SETTINGS[settings]]
        try:
            main(argv)
        except Stopped:
            continue
    return folder


def random_stops(rng: random.Random) -> list[tuple[str, int]]:
    hooks = [rng.choice(rng.choice([AT_BATCHES, SELDOM])) for _ in range(rng.randrange(1, 5))]
    return [(hook, rng.randrange(16 if hook in AT_BATCHES else 3)) for hook in hooks]


STOPS = {
    # the second comes after the validation was drawn and before anything was kept
    "validations": [("on_validation_batch_end", 1), ("on_validation_end", 0)],
    "validations between windows": [("on_before_optimizer_step", 2), ("on_validation_batch_end", 1)],
    "steps": [("on_validation_batch_end", 3)],  # in the validation after the last of them
}


@pytest.mark.parametrize("settings", slow_after_first(SETTINGS))
def test_a_run_stopped_in_any_hook_ends_with_the_same_bits_and_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str
) -> None:
    reference = run(tmp_path / "reference", monkeypatch, settings, [])
    drawn = Bomb.drawn
    _, curves = ending(reference)
    assert len({rate for _, rate in curves["lr"]}) > 1 or len(curves["val/loss"]) < 3, "the schedule does not move"
    rng = random.Random(settings)
    for trial, stops in enumerate([BOUNDARY, STOPS.get(settings) or random_stops(rng)]):
        folder = run(tmp_path / str(trial), monkeypatch, settings, stops)
        assert compare(folder, reference) == [], stops
        assert Bomb.drawn == drawn, stops


@pytest.mark.slow
def test_the_test_fails_where_random_states_and_place_are_not_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = run(tmp_path / "reference", monkeypatch, "epochs", [])
    monkeypatch.setattr(ExactResume, "on_load_checkpoint", Callback.on_load_checkpoint)
    folder = run(tmp_path / "other", monkeypatch, "epochs", [("on_train_batch_start", 5)])
    assert any("state_dict" in difference for difference in compare(folder, reference))


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["random_states", "windows"])
def test_each_part_of_the_position_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    reference = run(tmp_path / "reference", monkeypatch, "epochs", [])
    load = ExactResume.on_load_checkpoint

    def without(self: ExactResume, trainer: Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        if missing == "windows":
            checkpoint["position"]["windows"] -= 8
        load(self, trainer, module, checkpoint)
        self._is_restored = self._is_restored or missing == "random_states"

    monkeypatch.setattr(ExactResume, "on_load_checkpoint", without)
    folder = run(tmp_path / "other", monkeypatch, "epochs", [("on_train_batch_start", 5)])
    assert any("state_dict" in difference for difference in compare(folder, reference))


@pytest.mark.slow
def test_no_checkpoint_falls_inside_an_accumulation_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(tmp_path / "run", monkeypatch, "partial windows", [("on_after_backward", 7)])
    assert compare(folder, run(tmp_path / "reference", monkeypatch, "partial windows", [])) == []
    positions: list[int] = []
    save = ExactResume.on_save_checkpoint

    def noting(self: ExactResume, trainer: Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        save(self, trainer, module, checkpoint)
        positions.append(checkpoint["position"]["batch"])

    monkeypatch.setattr(ExactResume, "on_save_checkpoint", noting)
    monkeypatch.setattr("slm.run.callbacks.SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr("slm.run.callbacks.LARGEST_SHARE_OF_TIME", 1e9)
    run(tmp_path / "often", monkeypatch, "partial windows", [])
    assert set(positions) == {0, 3, 6, 9, 12, 15}


def test_another_batch_size_sees_the_rest_of_the_epoch_and_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class Seen(Bomb):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.strike("on_train_batch_start", trainer, ())
            seen.extend(hash(tuple(row)) for row in batch[0].tolist())

    monkeypatch.setattr(f"{__name__}.Bomb", Seen)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    Seen.hook, Bomb.left, Seen.left = "on_train_batch_start", 5, 5
    with pytest.raises(Stopped):
        main([*FLAGS, "--trainer.max_epochs=1"])
    Seen.hook = ""
    first = len(seen)
    main([*stress.RESUME, "--data.batch_size=13"])
    data = DummyData(20, 16, num_tokens=2300)
    data.setup()
    epoch = [hash(tuple(row)) for tokens, _ in data.train_dataloader() for row in tokens.tolist()]
    assert first == 5 * 8
    assert seen == epoch
    assert torch.load(stress.LAST, weights_only=True)["position"]["epoch"] == 1


def test_another_batch_size_inside_a_window_leaves_no_gap_in_the_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    Bomb.hook, Bomb.left = "on_train_batch_start", 5
    with pytest.raises(Stopped):
        main([*FLAGS, "--trainer.accumulate_grad_batches=2"])
    Bomb.hook = ""
    main([*stress.RESUME, "--data.batch_size=40"])
    state, curves = ending(Path())
    assert [step for step, _ in curves["train/loss"]] == list(range(state["global_step"]))

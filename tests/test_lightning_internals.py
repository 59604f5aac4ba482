"""What is private in Lightning and used all the same: that it is still there, and still needed."""

import ast
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, fit, small_data, small_model
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from slm.run import lightning_internals
from slm.run.resume import ExactResume

OF_TORCH = {
    "_is_avx512_bf16_supported", "_iterator", "_shutdown_workers", "_foreach_lerp", "_foreach_lerp_",
    "_modules", "_parameters", "_buffers",
}  # fmt: skip


def private_attributes(file: Path) -> set[str]:
    """Names with an underscore that a file reads of anything but `self` and `cls`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = node.value
            if not (isinstance(owner, ast.Name) and owner.id in ("self", "cls")):
                found.add(node.attr)
    return found


def test_private_names_are_read_in_one_file() -> None:
    for file in (ROOT / "slm").rglob("*.py"):
        if file.name == "lightning_internals.py":
            assert len(private_attributes(file)) < 12
            continue
        own = {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}
        allowed = OF_TORCH | own | {"_exit"}
        assert private_attributes(file) <= allowed, file


def test_the_loops_still_have_the_private_names() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    loop = trainer.fit_loop.epoch_loop
    assert isinstance(trainer.fit_loop._restarting, bool)
    assert isinstance(loop._restarting, bool)
    assert isinstance(loop.val_loop._restarting, bool)
    assert isinstance(loop._batches_that_stepped, int)
    assert loop._restart_stage == "none"
    assert callable(loop._should_check_val_fx)
    assert trainer.fit_loop._data_fetcher is None
    assert callable(loop._broadcast_sigterm_tensor)
    assert callable(trainer._signal_connector.register_signal_handlers)


@pytest.mark.parametrize("is_left_alone", [True, False])
def test_lightning_takes_the_signals_unless_it_is_kept_from_it(is_left_alone: bool) -> None:
    handlers: list[Any] = []

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            handlers.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, callbacks=[Look()], **quiet)
    trainer = lightning_internals.without_signals(trainer) if is_left_alone else trainer
    trainer.fit(small_model(), small_data())
    assert (handlers == [before]) == is_left_alone


def test_the_public_names_of_the_bars_still_assert_that_the_bars_are_there() -> None:
    bar = TQDMProgressBar()
    lightning_internals.close_bars(bar)
    with pytest.raises(TypeError):
        _ = bar.train_progress_bar


@pytest.mark.parametrize("place", ["in the middle of an epoch", "at the end of an epoch"])
def test_the_counters_of_a_position_are_those_that_lightning_counts(place: str) -> None:
    model, resume = small_model(), ExactResume()
    steps = {"in the middle of an epoch": 18, "at the end of an epoch": 28}[place]
    settings = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0}
    trainer = fit(model, small_data(batch_size=8), callbacks=[resume], **settings)
    position, counted = resume.position, trainer.fit_loop.state_dict()
    assert position is not None
    ours = lightning_internals.counters(
        steps, position.epoch, position.batch, position.total_batches, position.ends_epoch, position.is_unvalidated
    )
    assert ours.keys() <= counted.keys()
    for name in ("epoch_loop.batch_progress", "epoch_loop.automatic_optimization.optim_progress"):
        assert ours[name].keys() == counted[name].keys()
        totals = (ours[name], counted[name])
        if name == "epoch_loop.batch_progress":
            assert totals[0]["total"] == totals[1]["total"]
            assert totals[0]["current"] == totals[1]["current"]

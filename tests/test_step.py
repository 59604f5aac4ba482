"""What one optimizer step is made of: the true gradient of its window, and nothing that is not finite."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import fit, small_data, small_model
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision

from slm.data.windows import shuffled
from slm.errors import NotFiniteError
from slm.run.callbacks import SelfContained
from slm.training.language_model import LanguageModel
from slm.training.step import FiniteGuard


class Gradients(Callback):
    """Keeps the gradient of every optimizer step, flat."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
        if gradients:
            self.seen.append(torch.cat(gradients))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.on_before_zero_grad(trainer, pl_module, None)


@pytest.mark.parametrize(
    ("batch_size", "accumulate"),
    [(28, 2), (40, 3), (50, 4), (112, 2), (200, 3), (30, 1)],
    ids=["two batches of two", "last batch smaller", "one batch of four left", "one left", "one at all", "alone"],
)
def test_a_window_is_stepped_with_the_gradient_of_the_mean_loss_over_its_tokens(
    batch_size: int, accumulate: int
) -> None:
    data, model, gradients = small_data(batch_size=batch_size), small_model(learning_rate=1e-9), Gradients()
    twin = copy.deepcopy(model)
    fit(model, data, callbacks=[gradients], accumulate_grad_batches=accumulate, limit_val_batches=0)
    assert data.train_windows is not None
    windows = len(data.train_windows)
    assert windows == 112
    order = shuffled(torch.arange(windows), windows, 0, 0).tolist()
    size = batch_size * accumulate
    assert len(gradients.seen) == -(-windows // size)
    for index, seen in enumerate(gradients.seen):
        chosen = order[index * size : (index + 1) * size]
        tokens, targets = (torch.stack(part) for part in zip(*[data.train_windows[k] for k in chosen], strict=True))
        twin.zero_grad()
        F.cross_entropy(twin(tokens).flatten(0, 1), targets.flatten()).backward()
        expected = torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None])
        torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-6)


def test_the_first_steps_read_quarters_of_windows_where_that_is_asked() -> None:
    data, gradients = small_data(batch_size=30), Gradients()
    model = small_model(learning_rate=1e-9, short_context_steps=2)
    twin = copy.deepcopy(model)
    fit(model, data, callbacks=[gradients], limit_val_batches=0, max_epochs=1)
    assert data.train_windows is not None
    order = shuffled(torch.arange(112), 112, 0, 0).tolist()
    for index, seen in enumerate(gradients.seen):
        chosen = order[index * 30 : (index + 1) * 30]
        windows = [data.train_windows[k] for k in chosen]
        if index < 2:
            windows = [(t[i : i + 4], u[i : i + 4]) for t, u in windows for i in range(0, 16, 4)]
        tokens, targets = (torch.stack(part) for part in zip(*windows, strict=True))
        twin.zero_grad()
        F.cross_entropy(twin(tokens).flatten(0, 1), targets.flatten()).backward()
        expected = torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None])
        torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-6)


def test_the_logged_loss_is_the_mean_over_the_tokens_of_the_whole_step() -> None:
    class Logged(Callback):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            self.losses.append(trainer.callback_metrics.get("train/loss", torch.tensor(math.nan)).item())

    model, data, logged = small_model(learning_rate=1e-9), small_data(batch_size=50), Logged()
    twin = copy.deepcopy(model)
    fit(model, data, callbacks=[logged], accumulate_grad_batches=4, limit_val_batches=0, log_every_n_steps=1)
    assert data.train_windows is not None
    tokens, targets = (torch.stack(part) for part in zip(*[data.train_windows[k] for k in range(112)], strict=True))
    whole = F.cross_entropy(twin(tokens).flatten(0, 1), targets.flatten()).item()
    assert logged.losses[-1] == pytest.approx(whole, rel=1e-5)  # of batches of 50, 50 and 12 windows
    assert math.isnan(logged.losses[0])


class Poison(Callback):
    """Makes something not finite from one step on."""

    def __init__(self, what: str, value: float, step: int) -> None:
        self.what, self.value, self.step = what, value, step
        self.steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        healthy = pl_module.loss
        if self.what == "loss":
            pl_module.loss = lambda *args: healthy(*args) + (self.value if trainer.global_step >= self.step else 0)

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        if self.what == "gradient" and trainer.global_step >= self.step:
            pl_module.transformer.final_norm.weight.grad[0] = self.value

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_the_optimizer_and_is_named_with_its_step(
    what: str, value: float
) -> None:
    model, poison = small_model(), Poison(what, value, step=3)
    named = "loss" if what == "loss" else "norm of the gradient"
    with pytest.raises(NotFiniteError, match=re.escape(f"step 3: the {named}, {value}, is not finite")):
        fit(model, small_data(batch_size=8), callbacks=[poison])
    assert poison.steps == 3
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_loss_in_the_middle_of_a_window_that_is_not_finite_is_noticed() -> None:
    class InTheMiddle(Poison):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.value = float("nan") if batch_idx % 4 == 1 else 0.0

    with pytest.raises(NotFiniteError, match="the loss, nan"):
        fit(
            small_model(),
            small_data(batch_size=4),
            callbacks=[InTheMiddle("loss", 0.0, step=0)],
            accumulate_grad_batches=4,
        )


class Unseen(Callback):
    """Lets the guard look at logged steps alone, as on a GPU."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module._guard = FiniteGuard(raises_at_once=False)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "muon"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_where_looking_would_mean_waiting_no_weight_changes_from_a_bad_step_on(what: str, optimizer: str) -> None:
    expected, model = small_model(optimizer=optimizer), small_model(optimizer=optimizer)
    settings: dict[str, Any] = {"limit_val_batches": 0, "log_every_n_steps": 5, "gradient_clip_val": 1.0}
    fit(expected, small_data(batch_size=8), max_steps=3, **settings)
    poison = Poison(what, math.nan, step=3)
    with pytest.raises(NotFiniteError, match="step 3: the loss or the norm of the gradient is not finite"):
        fit(model, small_data(batch_size=8), callbacks=[poison, Unseen()], **settings)
    assert poison.steps == 4  # the fifth step is logged
    for weights, kept in zip(expected.parameters(), model.parameters(), strict=True):
        assert torch.equal(weights, kept)


@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 4, "limit_val_batches": 1}])
def test_a_bad_step_that_was_never_logged_is_told_at_the_next_validation_or_at_the_end(
    settings: dict[str, Any],
) -> None:
    poison = Poison("loss", math.nan, step=1)
    with pytest.raises(NotFiniteError, match="step 1: the loss or the norm of the gradient is not finite"):
        fit(
            small_model(),
            small_data(batch_size=8),
            callbacks=[poison, Unseen()],
            max_steps=6,
            **{"limit_val_batches": 0, "log_every_n_steps": 0, **settings},
        )
    assert poison.steps == (4 if settings else 6)


def scaled(model: LanguageModel, scale: float, steps: int, poison: Callback) -> torch.amp.GradScaler:
    """Train under a gradient scaler, as 16-mixed does on CUDA."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    fit(model, small_data(batch_size=4), plugins=[precision], max_steps=steps, callbacks=[poison], limit_val_batches=0)
    return scaler


def test_a_gradient_that_the_scaler_made_overflow_is_left_to_it() -> None:
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    scaler = scaled(model, 2.0**8, 4, Poison("gradient", float("inf"), step=0))
    assert scaler.get_scale() == 2.0**4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_gradient_that_overflows_at_any_scale_stops_the_run() -> None:
    with pytest.raises(NotFiniteError, match="the norm of the gradient, inf,"):
        scaled(small_model(), 2.0**4, 40, Poison("gradient", float("inf"), step=0))


def test_a_loss_that_is_not_finite_is_none_of_the_scalers_business() -> None:
    with pytest.raises(NotFiniteError, match="step 2: the loss, nan"):
        scaled(small_model(), 2.0**8, 40, Poison("loss", float("nan"), step=2))


def test_a_checkpoint_with_a_weight_that_is_not_finite_is_not_written(workdir: Path) -> None:
    model = small_model()
    trainer = fit(model, small_data(), max_steps=1, callbacks=[SelfContained()])
    torch.nn.init.constant_(model.transformer.final_norm.bias, float("inf"))
    with pytest.raises(NotFiniteError, match=r"transformer\.final_norm\.bias is not finite"):
        trainer.save_checkpoint("never.ckpt")
    assert not (workdir / "never.ckpt").exists()

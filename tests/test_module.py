import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, fit, small_data, small_model
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from slm.errors import InputError
from slm.run.loading import check_applicable
from slm.run.resume import ExactResume
from slm.training.language_model import LanguageModel
from slm.training.optimizers import build_optimizer


class Recorder(Callback):
    """Learning rate and validation metrics after every validation."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.metrics: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            self.metrics.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def test_the_defaults_are_those_of_the_teaching_script() -> None:
    expected = {
        "vocab_size": 10_000,
        "embed_dim": 128,
        "num_heads": 4,
        "num_layers": 2,
        "hidden_dim": 512,
        "max_seq_len": 128,
        "learning_rate": 1e-3,
        "optimizer": "adamw",
    }
    hparams = LanguageModel().hparams
    assert {name: hparams[name] for name in expected} == expected


def test_the_model_returns_logits_of_every_position() -> None:
    assert small_model()(torch.zeros(3, 5, dtype=torch.int64)).shape == (3, 5, 20)


def test_validation_metrics_equal_a_direct_computation_with_an_uneven_last_batch() -> None:
    model, data, recorder = small_model(), small_data(val_fraction=0.5, batch_size=10), Recorder()
    fit(model, data, callbacks=[recorder])
    assert data.val_windows is not None
    assert len(data.val_windows) % 10 not in (0, 5)
    tokens, targets = (
        torch.stack(part) for part in zip(*[data.val_windows[k] for k in range(len(data.val_windows))], strict=True)
    )
    with torch.no_grad():
        logits = model(tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert recorder.metrics[-1]["val/loss"] == pytest.approx(loss, abs=1e-5)
    assert recorder.metrics[-1]["val/perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert recorder.metrics[-1]["val/accuracy"] == pytest.approx(
        (logits.argmax(-1) == targets).float().mean().item(), abs=1e-6
    )


def test_what_was_evaluated_can_be_read_until_the_next_evaluation_begins() -> None:
    model = small_model()
    trainer = fit(model, small_data())
    mean = (model.loss_sum.compute() / model.num_tokens.compute()).item()
    assert mean == pytest.approx(trainer.callback_metrics["val/loss"].item(), rel=1e-6)


def test_a_validation_loss_that_is_not_a_number_is_not_averaged_away() -> None:
    model = small_model()
    torch.nn.init.constant_(model.transformer.final_norm.weight, math.nan)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    [metrics] = trainer.validate(model, datamodule=small_data(), verbose=False)
    assert math.isnan(metrics["val/loss"])


def test_a_single_batch_is_learned_by_heart() -> None:
    model = small_model(embed_dim=64, hidden_dim=128, learning_rate=1e-2, weight_decay=0.0, plateau_patience=1000)
    trainer = fit(model, small_data(batch_size=4), max_epochs=150, overfit_batches=1)
    assert trainer.callback_metrics["train/loss"].item() < 0.05


def test_prediction_is_the_greedy_next_token_of_each_held_out_window() -> None:
    model, data = small_model(), small_data()
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    predicted: Any = trainer.predict(model, datamodule=data)
    assert data.val_windows is not None
    tokens = torch.stack([data.val_windows[k][0] for k in range(len(data.val_windows))])
    assert torch.equal(torch.cat(predicted), model.eval()(tokens)[:, -1].argmax(-1))


class Scripted(LanguageModel):
    """Validates with losses from a list, so that the schedule can be seen alone."""

    losses: tuple[float, ...] = ()

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        if not self.trainer.sanity_checking:
            self.index = getattr(self, "index", -1) + 1

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        value = 0.0 if self.trainer.sanity_checking else self.losses[self.index]
        self.loss_sum.update(torch.tensor(value))
        self.num_correct.update(0)
        self.num_tokens.update(1)


def rates(losses: tuple[float, ...], hparams: dict[str, Any], **flags: Any) -> list[float]:
    model, recorder = Scripted(**SMALL, learning_rate=0.8, **hparams), Recorder()
    model.losses = losses
    fit(model, small_data(), callbacks=[recorder], limit_train_batches=4, limit_val_batches=1, **flags)
    return recorder.rates


def test_the_plateau_halves_the_rate_on_a_stalled_loss_and_not_on_a_falling_one() -> None:
    assert rates((3.0,) * 6, {"plateau_patience": 1}, max_epochs=6) == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2]
    assert rates((6.0, 5.0, 4.0, 3.0, 2.0, 1.0), {"plateau_patience": 1}, max_epochs=6) == [0.8] * 6


def test_the_plateau_counts_validations_and_not_epochs() -> None:
    halves = rates((3.0,) * 4, {"plateau_patience": 0}, max_epochs=2, val_check_interval=0.5)
    assert halves == pytest.approx([0.8, 0.4, 0.2, 0.1])
    assert rates((3.0,) * 2, {"plateau_patience": 0}, max_epochs=4, check_val_every_n_epoch=2) == [0.8, 0.4]


def test_factor_and_minimum_of_the_rate_are_those_asked_for() -> None:
    asked = {"plateau_patience": 0, "plateau_factor": 0.25, "min_learning_rate": 0.1}
    assert rates((3.0,) * 4, asked, max_epochs=4) == pytest.approx([0.8, 0.2, 0.1, 0.1])


def test_the_sanity_check_does_not_step_the_schedule() -> None:
    assert rates((5.0,) * 2, {"plateau_patience": 0}, max_epochs=2, num_sanity_val_steps=1) == [0.8, 0.4]


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_the_optimizer_is_the_one_asked_for_and_decays_matrices_alone(name: str, kind: type) -> None:
    model = small_model(optimizer=name, weight_decay=0.3, learning_rate=0.01)
    optimizer = build_optimizer(model.transformer, model.hparams, fused=True)
    assert type(optimizer) is kind
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decays[id(p)] for p in model.parameters()] == [0.3 if p.ndim == 2 else 0.0 for p in model.parameters()]
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}
    assert optimizer.defaults.get("momentum", 0.9) == 0.9


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_the_other_optimizers_train_too(name: str) -> None:
    before = small_model(optimizer=name)
    after = small_model(optimizer=name)
    fit(after, max_steps=2, limit_val_batches=0)
    assert not torch.equal(before.transformer.token_embedding.weight, after.transformer.token_embedding.weight)


def test_the_logged_gradient_norm_is_that_before_clipping() -> None:
    model, data = small_model(), small_data(batch_size=1000)
    trainer = fit(model, data, max_steps=1, gradient_clip_val=1e-3, limit_val_batches=0)
    twin = small_model()
    tokens, targets = next(iter(data.train_dataloader()))
    F.cross_entropy(twin(tokens).flatten(0, 1), targets.flatten()).backward()
    norm = torch.stack([p.grad.square().sum() for p in twin.parameters() if p.grad is not None]).sum().sqrt()
    assert norm > 1e-2
    assert trainer.callback_metrics["train/grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize("bad", [20, -1])
@pytest.mark.parametrize("place", ["tokens", "targets"])
def test_a_token_outside_the_vocabulary_is_refused_before_it_reaches_the_device(bad: int, place: str) -> None:
    tokens, targets = torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, 16, dtype=torch.int64)
    {"tokens": tokens, "targets": targets}[place][1, 3] = bad
    loader = DataLoader([(tokens[k], targets[k]) for k in range(2)], batch_size=2)  # type: ignore[arg-type]
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.raises(InputError, match=f"token id {bad} is outside the vocabulary of vocab_size=20"):
        trainer.fit(small_model(), loader)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"optimizer": "lion"}, "optimizer=lion must be"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be"),
        ({"plateau_factor": 1.0}, "plateau_factor=1.0 must be"),
        ({"plateau_patience": -1}, "plateau_patience=-1 must be"),
        ({"min_learning_rate": -1.0}, "min_learning_rate=-1.0 must be"),
        ({"embed_dim": 130}, "embed_dim=130 is not divisible by num_heads=2|num_heads"),
    ],
)
def test_a_hyper_parameter_out_of_range_is_refused_with_its_value(changes: dict[str, Any], message: str) -> None:
    if changes == {"embed_dim": 130}:
        changes = {"embed_dim": 130, "num_heads": 4}
    with pytest.raises(InputError, match=message):
        small_model(**changes)


def test_hyper_parameters_are_flat_primitives() -> None:
    assert all(type(value) in (int, float, bool, str, type(None)) for value in small_model().hparams.values())


def test_a_notebook_can_build_train_and_load_it_without_the_command_line(tmp_path: Path) -> None:
    model = small_model()
    trainer = Trainer(accelerator="cpu", max_epochs=2, default_root_dir=tmp_path, enable_progress_bar=False)
    trainer.fit(model, datamodule=small_data())
    [path] = tmp_path.rglob("*.ckpt")
    again = LanguageModel.load_from_checkpoint(path, weights_only=True)
    tokens = torch.randint(20, (2, 16))
    assert torch.equal(again.eval()(tokens), model.eval()(tokens))


def test_a_resumed_run_lets_the_hyper_parameters_in_force_win(tmp_path: Path) -> None:
    model = small_model(learning_rate=1e-3, weight_decay=0.1, plateau_patience=2)
    trainer = fit(model, max_epochs=1, callbacks=[ExactResume()])
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    model = small_model(
        learning_rate=5e-4, weight_decay=0.2, plateau_patience=7, plateau_factor=0.1, min_learning_rate=1e-6
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    again = Trainer(accelerator="cpu", max_epochs=2, callbacks=[ExactResume()], **quiet)  # type: ignore[arg-type]
    again.fit(model, datamodule=small_data(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    groups = again.optimizers[0].param_groups
    assert [group["lr"] for group in groups] == [5e-4, 5e-4]
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]
    schedule = again.lr_scheduler_configs[0].scheduler
    assert (schedule.patience, schedule.factor, schedule.min_lrs) == (7, 0.1, [1e-6, 1e-6])  # type: ignore[union-attr]


def test_a_decay_can_be_turned_on_for_a_run_that_had_none(tmp_path: Path) -> None:
    fit(small_model(weight_decay=0.0), callbacks=[ExactResume()]).save_checkpoint(tmp_path / "one.ckpt")
    again = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, callbacks=[ExactResume()]
    )
    again.fit(small_model(weight_decay=0.5), datamodule=small_data(), ckpt_path=tmp_path / "one.ckpt")
    assert [group["weight_decay"] for group in again.optimizers[0].param_groups] == [0.5, 0.0]


def test_a_reduced_rate_is_kept_where_no_other_is_asked_for(tmp_path: Path) -> None:
    model = Scripted(**SMALL, learning_rate=0.8, plateau_patience=0)
    model.losses = (3.0, 3.0)
    trainer = fit(model, max_epochs=2, limit_val_batches=1)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    again = small_model(learning_rate=0.8, plateau_patience=0)
    resumed = Trainer(accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False, limit_val_batches=0)
    resumed.fit(again, datamodule=small_data(), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert resumed.optimizers[0].param_groups[0]["lr"] == 0.4


def test_a_checkpoint_of_another_shape_is_refused_with_both_values() -> None:
    stored, asked = dict(small_model().hparams), dict(small_model(hidden_dim=64).hparams)
    with pytest.raises(InputError, match="hidden_dim=64 cannot apply to a checkpoint trained with hidden_dim=32"):
        check_applicable(stored, asked, LanguageModel)


def test_an_option_that_a_checkpoint_does_not_know_had_its_default() -> None:
    asked = dict(LanguageModel().hparams)
    stored = {name: value for name, value in asked.items() if name != "hidden_dim"}
    check_applicable(stored, asked, LanguageModel)
    with pytest.raises(InputError, match="hidden_dim=64 cannot apply to a checkpoint trained with hidden_dim=512"):
        check_applicable(stored, {**asked, "hidden_dim": 64}, LanguageModel)

import math
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SMALL_FLAGS, fit, small_data, small_model
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from slm.cli import main
from slm.data import DummyData
from slm.run.resume import ExactResume
from slm.watch import monitor
from slm.watch.monitor import Forecast, KnownLimits, ProgressBar, StepMonitor

RUN = Path("runs/version_0")


class Clock:
    """Time that passes only where the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that the callbacks look at."""
    clock = Clock()
    monkeypatch.setattr(monitor, "time", clock)
    return clock


class Costs(Callback):
    """Takes a second for a training step, and a hundred for a validation and for a checkpoint."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.speeds: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if "train/tokens_per_second" in trainer.callback_metrics:
            self.speeds.append(trainer.callback_metrics["train/tokens_per_second"].item())

    def on_before_zero_grad(self, *_: Any) -> None:
        self.clock.now += 1.0

    def on_validation_epoch_end(self, *_: Any) -> None:
        self.clock.now += 100.0

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint("any.ckpt")
        self.clock.now += 100.0


@pytest.mark.parametrize("limit_val_batches", [1.0, 0])
def test_speed_counts_training_and_leaves_out_validation_and_saving(limit_val_batches: float, clock: Clock) -> None:
    costs = Costs(clock)
    data = small_data(batch_size=8)
    data.setup()
    assert len(data.train_dataloader()) == 14
    flags = {"max_epochs": 3, "log_every_n_steps": 4, "limit_val_batches": limit_val_batches}
    fit(small_model(), data, callbacks=[StepMonitor(), costs], **flags)
    assert costs.speeds == [pytest.approx(8 * 16)] * (3 * 14 - 3)


def test_a_run_says_once_how_long_it_takes(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    fit(small_model(), small_data(batch_size=8), callbacks=[Forecast(), Costs(clock)], max_epochs=20)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "tokens/s" in line]
    speed, _, times = line.partition(": ")
    assert speed.startswith("128 tokens/s on ")  # 8 windows of 16 in a second
    assert times == f"14.0 s an epoch, {(20 * 14 - 3) / 60:.1f} min to go, without validation"


def test_it_is_said_however_short_the_epochs_are(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    fit(small_model(), small_data(), callbacks=[Forecast(), Costs(clock)], limit_train_batches=2, max_epochs=20)
    assert "2.0 s an epoch, 36.0 s to go, without validation" in capsys.readouterr().err


def test_a_run_takes_no_longer_than_it_may(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Timer, "time_remaining", lambda self: 100.0)
    watched = [Forecast(), Costs(clock)]
    fit(small_model(), small_data(batch_size=8), callbacks=watched, max_epochs=20, max_time="00:00:10:00")
    assert "14.0 s an epoch, 100.0 s to go, without validation" in capsys.readouterr().err


def test_what_is_timed_with_windows_in_quarters_is_not_promised_of_whole_ones(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model(short_context_steps=50)
    fit(model, small_data(batch_size=8), callbacks=[Forecast(), Costs(clock)], max_epochs=20)
    assert "without validation, and more once windows are read whole" in capsys.readouterr().err


def test_a_run_that_is_over_soon_says_nothing_of_it(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    fit(small_model(), small_data(), callbacks=[Forecast()])
    assert "tokens/s" not in capsys.readouterr().err


def test_speed_counts_the_tokens_of_an_accumulated_step() -> None:
    class Seen(Callback):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.tokens.append(step_monitor._tokens)

    step_monitor = StepMonitor()
    seen = Seen()
    fit(
        small_model(),
        small_data(batch_size=10),
        accumulate_grad_batches=3,
        log_every_n_steps=1,
        limit_train_batches=6,
        callbacks=[step_monitor, seen],
    )
    assert seen.tokens == [160, 320, 0, 160, 320, 0]


def test_speed_counts_the_tokens_of_all_devices() -> None:
    step_monitor = StepMonitor()
    data = SimpleNamespace(windows_in=lambda batch, is_training: (2, 6))
    trainer: Any = SimpleNamespace(world_size=3, global_step=1, log_every_n_steps=10, datamodule=data)
    step_monitor.on_train_batch_end(trainer, small_model(), None, (torch.zeros(2, 5), torch.zeros(2, 5)), 0)
    assert step_monitor._tokens == 30


class Reads(TorchDispatchMode):
    """Counts the floating-point values that are fetched from a tensor, which on a GPU would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func._schema.name == "aten::_local_scalar_dense":
            self.count += args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


def test_no_value_is_fetched_from_the_device_between_logging_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    class ReadsOfEachStep(Callback):
        def __init__(self) -> None:
            self.counts: list[int] = []

        def on_train_batch_start(self, *_: Any) -> None:
            self.counts.append(reads.count)

    monkeypatch.setattr(monitor, "SECONDS_BETWEEN_REFRESHES", 0.0)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    counter = ReadsOfEachStep()
    flags = {"log_every_n_steps": 5, "limit_train_batches": 20, "limit_val_batches": 0, "gradient_clip_val": 1.0}
    with Reads() as reads:
        callbacks = [ProgressBar(), ExactResume(), StepMonitor(), counter]
        fit(small_model(), small_data(batch_size=4), callbacks=callbacks, enable_progress_bar=True, **flags)
    of_steps = [after - before for before, after in pairwise(counter.counts)]
    assert [step for step, count in enumerate(of_steps, start=1) if count] == [1, 5, 10, 15]


def test_the_bar_shows_the_last_logged_loss_wherever_an_epoch_ends() -> None:
    class Shown(Callback):
        def __init__(self) -> None:
            self.losses: list[tuple[str, str]] = []

        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step > 4:
                logged = trainer.callback_metrics["train/loss"].item()
                self.losses.append((bar.get_metrics(trainer, small_model())["loss"], f"{logged:.3f}"))

    bar, shown = ProgressBar(), Shown()
    flags = {"log_every_n_steps": 4, "limit_train_batches": 7, "limit_val_batches": 0, "max_epochs": 3}
    fit(
        small_model(learning_rate=0.1),
        small_data(batch_size=4),
        callbacks=[bar, shown],
        enable_progress_bar=True,
        **flags,
    )
    assert [ours for ours, _ in shown.losses] == [logged for _, logged in shown.losses]
    assert len({ours for ours, _ in shown.losses}) >= 4


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    flags = ["--data.batch_size=4", "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("curves"))
        main([*SMALL_FLAGS, *flags])
        return EventAccumulator(str(RUN)).Reload()


def test_a_run_of_a_few_dozen_steps_has_every_curve(curves: EventAccumulator) -> None:
    tags = set(curves.Tags()["scalars"])
    train = {"train/loss", "train/grad_norm", "train/tokens_per_second", "train/tokens", "lr"}
    validation = {"val/loss", "val/perplexity", "val/accuracy", "val/optimum"}
    assert train | validation <= tags
    assert tags - train - validation == {"best/val_loss"}
    for tag in train - {"train/tokens"}:
        assert [point.step for point in curves.Scalars(tag)] == [9, 19, 29, 39, 49], tag
    tokens = [(point.step, point.value) for point in curves.Scalars("train/tokens")]  # also beside each validation
    assert tokens == [(step, 4 * 16 * (step + 1)) for step in (9, 19, 27, 29, 39, 49, 55)]
    assert [point.value for point in curves.Scalars("lr")] == [pytest.approx(1e-3)] * 5
    losses = [point.value for point in curves.Scalars("train/loss")]
    assert losses[0] == pytest.approx(math.log(20), abs=0.1)
    assert losses[-1] == pytest.approx(curves.Scalars("val/loss")[-1].value, abs=0.3)
    for tag in validation:
        assert len(curves.Scalars(tag)) == 2, tag


def test_the_optimum_stands_beside_the_loss(curves: EventAccumulator) -> None:
    data = DummyData(20, 16)
    assert [point.value for point in curves.Scalars("val/optimum")] == [pytest.approx(data.optimum)] * 2
    assert [p.step for p in curves.Scalars("val/optimum")] == [p.step for p in curves.Scalars("val/loss")]


def test_the_hyper_parameters_of_a_finished_run_stand_with_its_final_loss(curves: EventAccumulator) -> None:
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = curves.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hparams = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["embed_dim"].number_value == 16
    assert hparams["batch_size"].number_value == 4
    best = min(point.value for point in curves.Scalars("val/loss"))
    assert curves.Scalars("best/val_loss")[-1].value == pytest.approx(best, abs=1e-3)


def test_bits_per_byte_are_known_where_the_bytes_of_a_token_are() -> None:
    data = small_data()
    data.token_bytes = torch.arange(20.0)
    metrics = fit(small_model(), data, callbacks=[KnownLimits()], limit_val_batches=2).callback_metrics
    targets = torch.cat([targets for _, targets in data.val_dataloader()][:2])
    bits = metrics["val/loss"] * targets.numel() / torch.log(torch.tensor(2.0))
    expected = bits / targets.sum()
    assert metrics["val/bits_per_byte"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert "val/bits_per_byte" not in fit(small_model(), small_data(), callbacks=[KnownLimits()]).callback_metrics

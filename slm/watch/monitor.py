"""What a run shows: its bar, its speed, and the known optimum beside the loss."""

import contextlib
import math
import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor
from torchmetrics import SumMetric

from slm.errors import InputError
from slm.hardware import describe
from slm.messages import say
from slm.run.lightning_internals import close_bars
from slm.run.resume import is_fitting
from slm.training.language_model import LanguageModel
from slm.training.optimizers import num_steps
from slm.training.step import is_logged

SPEED = "train/tokens_per_second"
SECONDS_BETWEEN_REFRESHES = 0.1
SECONDS_TO_TIME = 2.0


class ProgressBar(TQDMProgressBar):
    """One line an epoch: loss, validation loss and tokens per second."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1 if sys.stdout.isatty() else 10, leave=True)
        self._shown: dict[str, Any] = {}
        self._next_refresh = 0.0

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Begin inside an epoch where a resumed run does."""
        super().on_train_start(trainer)
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if done:
            self.on_train_epoch_start(trainer)
            self.train_progress_bar.initial = self.train_progress_bar.n = done

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Draw the bar at most ten times a second: drawing takes longer than a small model's step."""
        if trainer.global_step == 1 or is_logged(trainer, trainer.global_step):
            self._read(trainer)
        now = time.perf_counter()
        if now >= self._next_refresh or trainer.is_last_batch:
            self._next_refresh = now + SECONDS_BETWEEN_REFRESHES
            super().on_train_batch_end(trainer, *args)

    def on_exception(self, *_: Any) -> None:
        """Give what is said next a line of its own."""
        close_bars(self)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Those of the last logging step: to read newer ones, every step would have to wait for the device."""
        if not trainer.training:
            self._read(trainer)
        return self._shown

    def _read(self, trainer: Trainer) -> None:
        metrics = trainer.callback_metrics
        shown = {"loss": ("train/loss", ".3f"), "val_loss": ("val/loss", ".3f"), "tokens/s": (SPEED, ",.0f")}
        self._shown = {name: format(metrics[tag], style) for name, (tag, style) in shown.items() if tag in metrics}


def tokens_in(trainer: Trainer, batch: tuple[Tensor, Tensor], batch_idx: int) -> int:
    """How many tokens a training batch has on all devices together."""
    _, num_windows = trainer.datamodule.windows_in(batch_idx, is_training=True)  # type: ignore[attr-defined]
    return int(num_windows * batch[0].shape[1])


class Forecast(Callback):
    """Says once, when the first steps are timed, how long the run takes on this machine."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._seconds = 0.0
        self._batches = self._tokens = 0
        self._is_said = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: tuple[Tensor, Tensor], batch_idx: int
    ) -> None:
        """Time batches, but for the first of all and the first after a validation."""
        if self._is_said:
            return
        since, self._since = self._since, time.perf_counter()
        if since is None:
            return
        self._seconds += self._since - since
        self._batches, self._tokens = self._batches + 1, self._tokens + tokens_in(trainer, batch, batch_idx)
        if self._seconds < SECONDS_TO_TIME:
            return
        self._is_said = True
        of_a_batch = self._seconds / self._batches
        times = [f"{duration(of_a_batch * trainer.num_training_batches)} an epoch"]
        timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
        seconds_left = [left for timer in timers if (left := timer.time_remaining()) is not None]
        with contextlib.suppress(InputError):
            batches = (num_steps(trainer) - trainer.global_step) * trainer.accumulate_grad_batches
            seconds_left.append(of_a_batch * batches)
        if seconds_left:
            times.append(f"{duration(min(seconds_left))} to go")
        times.append("without validation")
        if trainer.global_step < pl_module.hparams.get("short_context_steps", 0):
            times.append("and more once windows are read whole")
        with Tqdm.external_write_mode(sys.stderr):
            say(f"{self._tokens / self._seconds:,.0f} tokens/s on {describe(pl_module.device)}: {', '.join(times)}")

    def on_validation_start(self, *_: Any) -> None:
        self._since = None


def duration(seconds: float) -> str:
    """In the unit in which it can be imagined."""
    for unit, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s"


class StepMonitor(Callback):
    """Logs the learning rate, the tokens trained on, and how many a second between two log points, on all devices.

    Fetching data and logging count; the clock stands still from the start of a validation or the writing of a
    checkpoint to the next training batch.
    """

    def __init__(self) -> None:
        self._running_since: float | None = None
        self._elapsed = 0.0
        self._tokens = 0
        self._logged_step = 0
        self._step = 0
        self._window_tokens = 0
        self._all_tokens = 0
        self._learning_rate = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Of the steps that are done: a resumed run trains the batches of an unfinished one again."""
        return {"tokens": self._all_tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._all_tokens = state_dict["tokens"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step
        if self._running_since is None:
            self._running_since = time.perf_counter()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._learning_rate = optimizer.param_groups[0]["lr"]  # after the step it is that of the next

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: tuple[Tensor, Tensor], batch_idx: int
    ) -> None:
        num_tokens = tokens_in(trainer, batch, batch_idx)
        self._tokens += num_tokens
        self._window_tokens += num_tokens
        step = trainer.global_step
        if step != self._step:
            self._all_tokens, self._window_tokens = self._all_tokens + self._window_tokens, 0
        if is_logged(trainer, step) and step != self._logged_step:
            self._stop_clock()
            pl_module.log(SPEED, self._tokens / self._elapsed)
            pl_module.log("train/tokens", float(self._all_tokens))
            pl_module.log("lr", self._learning_rate)
            self._running_since = time.perf_counter()
            self._elapsed, self._tokens, self._logged_step = 0.0, 0, step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_clock()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the tokens beside the loss too, where the step did not."""
        if is_fitting(trainer) and not is_logged(trainer, trainer.global_step):
            pl_module.log("train/tokens", float(self._all_tokens), sync_dist=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._stop_clock()

    def _stop_clock(self) -> None:
        if self._running_since is not None:
            self._elapsed += time.perf_counter() - self._running_since
            self._running_since = None


class KnownLimits(Callback):
    """Logs beside the validation loss what is known of the data: its optimum, and the loss in bits per byte."""

    def __init__(self) -> None:
        self._num_bytes = SumMetric()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._num_bytes = SumMetric().to(pl_module.device)

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        here, _ = data.windows_in(batch_idx, is_training=False)
        if data.token_bytes is not None and here:
            self._num_bytes.update(data.token_bytes.to(pl_module.device)[batch[1]].sum())

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, "test")

    def _log(self, trainer: Trainer, module: LightningModule, split: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(module, LanguageModel)
        if data.optimum is not None:
            module.log(f"{split}/optimum", data.optimum, sync_dist=True)
        if data.token_bytes is not None:
            bits = module.loss_sum.compute() / math.log(2)
            module.log(f"{split}/bits_per_byte", bits / self._num_bytes.compute(), sync_dist=True)

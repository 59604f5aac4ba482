"""What a run will take on this machine, found by training its first steps."""

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer

from slm.errors import check, leave_at_once
from slm.training.optimizers import num_steps

STEPS_UNTIMED, STEPS_TIMED, SECONDS_TIMED = 3, 50, 3.0
"""Of a run's first steps, the slow ones; and the most steps, or seconds, that are timed."""
SHARE_OF_VALIDATION = 1 / 3
"""Of what training on a batch takes: the forward pass alone."""
COMMAND = "cost"
"""What `slm.sweep` is told to time first steps."""
MARK = "cost "


@dataclass(frozen=True)
class Cost:
    """What a run takes.

    Attributes:
        parameters: of its network.
        steps: optimizer steps.
        milliseconds: of a step.
        seconds: of all steps and validations; a command takes a few more to start.
    """

    parameters: int
    steps: int
    milliseconds: float
    seconds: float


class Timing(Callback):
    """Times a run's first steps, prints what all of it will cost, and ends the process."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._batches, self._since = 0, time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self._batches += 1
        timed, seconds = self._batches - STEPS_UNTIMED, time.perf_counter() - self._since
        if timed <= 0:
            self._since = time.perf_counter()
        elif timed >= STEPS_TIMED or seconds >= SECONDS_TIMED or trainer.is_last_batch:
            self._answer(trainer, pl_module, seconds / timed)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Of a run that is over so soon."""
        self._answer(trainer, pl_module, (time.perf_counter() - self._since) / max(1, self._batches))

    def _answer(self, trainer: Trainer, module: Any, of_a_batch: float) -> None:
        print(MARK + json.dumps(vars(self._cost(trainer, module, of_a_batch))), flush=True)
        leave_at_once(0)

    def _cost(self, trainer: Trainer, module: Any, of_a_batch: float) -> Cost:
        steps, at_once = num_steps(trainer), trainer.accumulate_grad_batches
        batches = steps * at_once
        of_validation = sum(trainer.num_val_batches) * of_a_batch * SHARE_OF_VALIDATION
        validations = batches / float(trainer.val_check_batch or math.inf) / (trainer.check_val_every_n_epoch or 1)
        seconds = batches * of_a_batch + (1 + validations) * of_validation  # once more at the end
        timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
        limits = [left for timer in timers if (left := timer.time_remaining()) is not None]
        parameters = sum(weight.numel() for weight in module.transformer.parameters())
        return Cost(parameters, steps, of_a_batch * at_once * 1e3, min([seconds, *limits]))


def cost_of(argv: Sequence[str]) -> Cost:
    """Train the first steps of a command line of `train.py` in a process and a folder of its own.

    Raises:
        InputError: they cannot be trained, for the reason that the message gives.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = [*argv, f"--trainer.default_root_dir={folder}", "--trainer.callbacks+=slm.research.cost.Timing"]
        command = [sys.executable, "-m", "slm.sweep", COMMAND, *flags]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    found = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
    errors = [line.removeprefix("error: ") for line in result.stderr.splitlines() if line.startswith("error: ")]
    check(bool(found), errors[-1] if errors else f"its first steps ended with status {result.returncode}")
    return Cost(**json.loads(found[-1]))

"""What is said: the project's own lines, and the libraries' notices, silenced by name."""

import logging
import re
import sys
import warnings
from typing import Any

LOG_LINES = {
    "tensorboard": ["Detected out of order event.step"],  # a killed run's points, which were drawn again
    "lightning.fabric.utilities.seed": [r"(\[rank: \d+\] )?Seed set to "],
    "lightning.fabric.utilities.distributed": ["Initializing distributed: "],
    "lightning.pytorch.utilities.rank_zero": [
        "GPU available: ",
        "TPU available: ",
        "HPU available: ",
        "LOCAL_RANK: ",
        "-{20,}",  # "distributed_backend=gloo", in a box
        "Using (bfloat16|16bit) Automatic Mixed Precision",
        ".*Tip: ",  # an advertisement
        r"`Trainer\(.*\)` was configured so",  # says again what was asked
        "Running in `fast_dev_run` mode",  # the closing report says what it lacks
        "`Trainer.fit` stopped: ",
        "Restoring states from the checkpoint",
        "Restored all states from the checkpoint",
        "Loaded model weights from the checkpoint",
        "An .* was raised with message",  # the exception itself is shown
    ],
}
"""Log lines, by logger, that tell nothing a user can act on: regular expressions for their beginning."""

WARNINGS = {
    "lightning.pytorch.utilities._pytree": ["`isinstance\\(treespec, LeafSpec\\)` is deprecated"],
    "lightning.pytorch.trainer.connectors.data_connector": [
        "You have overridden `on_before_batch_transfer` in `LightningModule`",  # which is where it belongs
        "The '.*_dataloader' does not have many workers",  # the windows come from memory
    ],
    "lightning.pytorch.trainer.call": [
        "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",  # an evaluation needs none
    ],
    "lightning.pytorch.loops.fit_loop": [
        "The number of training batches .* is smaller than the logging interval",  # it counts on over epochs
    ],
    "lightning.pytorch.loops.training_epoch_loop": [
        "You're resuming from a checkpoint that ended before the epoch ended",  # the data goes on where it was
        "ReduceLROnPlateau conditioned on metric val/loss which is not available",  # an epoch without validation
    ],
    "lightning.pytorch.callbacks.model_checkpoint": [
        "Checkpoint directory .* exists and is not empty",  # a resumed run's own
    ],
}
"""Warnings, by the module that gives them, likewise."""


def silence_notices() -> None:
    """Silence the notices listed above, one by one; any other warning or log line still appears."""
    for module, messages in WARNINGS.items():
        for message in messages:
            warnings.filterwarnings("ignore", message=message, module=re.escape(module))
    for name, lines in LOG_LINES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(present, _Silence) for present in logger.filters):
            logger.addFilter(_Silence(lines))


class _Silence(logging.Filter):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.pattern = re.compile("|".join(lines))

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.pattern.match(record.getMessage())


def is_first_process() -> bool:
    """Whether this is the first of several processes. Lightning knows; where nothing has imported it, there is one."""
    lightning: Any = sys.modules.get("lightning.fabric.utilities.rank_zero")
    return lightning is None or lightning.rank_zero_only.rank == 0


def say(message: str) -> None:
    """Print a line on stderr, once, however many processes there are."""
    if is_first_process():
        say_here(message)


def say_here(message: str) -> None:
    """The same, from whichever process it is."""
    print(message, file=sys.stderr, flush=True)

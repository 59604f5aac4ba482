"""Private names of Lightning: all that this package touches, each with its reason.

A test fails when one of them is no longer there.
"""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


def is_validation_due(trainer: Trainer) -> bool:
    """Whether a validation follows the batch that was trained last. Lightning decides it after every public hook."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def begin_with_a_new_epoch(trainer: Trainer) -> None:
    """Let a resumed run begin an epoch. With max_steps, Lightning takes the end of one for the middle of it."""
    loop = trainer.fit_loop.epoch_loop
    trainer.fit_loop._restarting = loop._restarting = loop.val_loop._restarting = False


def begin_after_validation(trainer: Trainer) -> None:
    """Let a resumed run begin with a batch. Lightning would repeat a validation that is done, or count it as a step."""
    trainer.fit_loop.epoch_loop._restart_stage = "none"


def count_a_batch_that_stepped(trainer: Trainer) -> None:
    """Lightning tells the steps at which it logs by a counter of batches, which has no public name."""
    trainer.fit_loop.epoch_loop._batches_that_stepped += 1


def without_signals(trainer: Trainer) -> Trainer:
    """Leave signals to `slm.run.signals`.

    Lightning's handler of SIGTERM broadcasts, and waits for ever where one process alone was told. Its training loop
    broadcasts before every batch whether there was one, which a GPU is waited for.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


def close_bars(progress_bar: TQDMProgressBar) -> None:
    """Close the bars that are there. Their public names assert that they are."""
    for bar in (progress_bar._train_progress_bar, progress_bar._val_progress_bar):
        if bar is not None:
            bar.close()


def counters(steps: int, epoch: int, batch: int, total_batches: int, is_last: bool, is_unvalidated: bool) -> Any:
    """The state of Lightning's fit loop after so many steps, at a place between two of them.

    The names in it are those of the loops' `state_dict`, which is public, but its content is not described.

    Args:
        steps: optimizer steps that are done.
        epoch: epochs that are complete.
        batch: batches of the next epoch that are trained.
        total_batches: batches that are trained in all epochs.
        is_last: whether these batches are the whole epoch.
        is_unvalidated: whether the validation that is due is still to be done.
    """

    def counts(done: int, begun: int | None = None) -> dict[str, int]:
        begun = done if begun is None else begun
        return {"ready": begun, "started": begun, "processed": done, "completed": done}

    def both(total: dict[str, int], current: dict[str, int]) -> dict[str, dict[str, int]]:
        return {"total": total, "current": current}

    epochs = counts(epoch, epoch + (batch > 0))
    validation = counts(0, int(is_unvalidated))  # begun and not processed: Lightning begins it again
    step, zero_grad = {"ready": steps, "completed": steps}, {"ready": steps, "started": steps, "completed": steps}
    return {
        "epoch_progress": both(epochs, dict(epochs)),
        "epoch_loop.batch_progress": {**both(counts(total_batches), counts(batch)), "is_last_batch": is_last},
        "epoch_loop.automatic_optimization.optim_progress": {
            "optimizer": {"step": both(step, dict(step)), "zero_grad": both(zero_grad, dict(zero_grad))}
        },
        "epoch_loop.val_loop.batch_progress": {**both(validation, counts(0)), "is_last_batch": False},
        # the last step of an epoch under way is counted once more when the loop begins
        "epoch_loop.state_dict": {"_batches_that_stepped": steps - (batch > 0)},
    }

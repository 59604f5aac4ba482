"""Where a run stands between two optimizer steps, and how it goes on there, exact to the bit.

Lightning restores weights, optimizer, scheduler and its counters. It restores neither random states nor the place in
the data, and from its counters alone some places are not found again. So every checkpoint says here where the run
stands, in words of its own, and a resumed run's counters are set from that.
"""

import copy
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from slm.data.token_data import TokenData
from slm.errors import NotFiniteError
from slm.run.random_states import put_random_states, take_random_states


@dataclass(frozen=True)
class Position:
    """A place between two optimizer steps.

    Attributes:
        epoch: epochs that are complete.
        batch: batches of the next epoch that are trained.
        total_batches: batches that are trained in all epochs.
        ends_epoch: whether these batches are the whole epoch.
        is_unvalidated: whether the validation that is due after these batches is still to be done.
    """

    epoch: int
    batch: int
    total_batches: int
    ends_epoch: bool = False
    is_unvalidated: bool = False


class ExactResume(Callback):
    """Adds to every checkpoint where the run stands, with its random states, and brings a resumed run back there.

    A checkpoint that is written inside an accumulation window stands where the window began: no weight has changed
    since, and what a validation inside the window changed is kept as it was. Place this callback first, so that no
    other has acted on a batch before.

    Attributes:
        position: where a checkpoint written now would stand; None before the first batch.
        is_between_steps: whether no batch of an accumulation window is trained yet.
    """

    def __init__(self) -> None:
        self.position: Position | None = None
        self.is_between_steps = True
        self._random_states: dict[str, Any] | None = None  # at the position; None: the present ones
        self._before_validation: dict[str, Any] | None = None  # at the position, if a validation came after it
        self._is_half_done = False
        self._is_restored = True
        self._is_inside_epoch = False  # a resumed run, before its first batch

    @property
    def can_be_kept(self) -> bool:
        """Whether a checkpoint written now has a position, and nothing in it is newer than that."""
        return self.position is not None and self.position.total_batches > 0 and not self._is_half_done

    # ---- where the run stands

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._restore_random_states(trainer)
        if self._is_inside_epoch:
            self._is_inside_epoch = False
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, GradientAccumulationScheduler):  # it counts on the beginning of an epoch
                    callback.on_train_epoch_start(trainer)
        if self.is_between_steps:
            self._is_half_done = False
            total = trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1
            self.position = Position(trainer.current_epoch, batch_idx, total)
            self._random_states = take_random_states(trainer.strategy.root_device)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._is_half_done = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.is_between_steps = not trainer.fit_loop._should_accumulate()
        if self.is_between_steps:
            loop = trainer.fit_loop.epoch_loop
            self.position = Position(
                trainer.current_epoch,
                batch_idx + 1,
                loop.batch_progress.total.ready,
                ends_epoch=loop._num_ready_batches_reached(),
                is_unvalidated=_is_validation_due(trainer),
            )
            self._random_states = self._before_validation = None
            # half done it stays until Lightning has logged it, after this hook

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_fitting(trainer):
            self._restore_random_states(trainer)
            # no run would come back to a validation after the last of max_steps
            self._is_half_done = 0 < trainer.max_steps <= trainer.global_step
            self._random_states = self._random_states or take_random_states(trainer.strategy.root_device)
            if not self.is_between_steps and self._before_validation is None:
                self._before_validation = _moved_by_validation(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_between_steps and is_fitting(trainer):
            self._is_half_done = True  # until the schedule has moved and the best checkpoint is chosen

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_between_steps and self.position is not None and is_fitting(trainer):
            self.position, self._random_states = replace(self.position, is_unvalidated=False), None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_half_done = not self.is_between_steps

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, NotFiniteError):  # raised before the optimizer changes anything
            self._is_half_done = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        position = self.position
        if position is None:
            return
        if position.ends_epoch and not position.is_unvalidated:
            position = Position(position.epoch + 1, 0, position.total_batches)
        windows = _data(trainer).windows_before(position.epoch, position.batch)
        checkpoint["position"] = {**asdict(position), "windows": windows}
        checkpoint["epoch"] = position.epoch
        checkpoint["random_states"] = self._random_states or take_random_states(trainer.strategy.root_device)
        if self._before_validation is not None:
            checkpoint.update(copy.deepcopy(self._before_validation))
            for state, scheduler in zip(checkpoint["optimizer_states"], checkpoint["lr_schedulers"], strict=False):
                for group, learning_rate in zip(state["param_groups"], scheduler["_last_lr"], strict=True):
                    group["lr"] = learning_rate

    # ---- how it goes on there

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit" or "position" not in checkpoint:
            return
        data, stored = _data(trainer), dict(checkpoint["position"])
        windows = stored.pop("windows")
        if checkpoint.get("fingerprint") != data.fingerprint:
            _forget_scores(checkpoint)
            windows, stored["ends_epoch"], stored["is_unvalidated"] = 0, False, False
        data.start_at(stored["epoch"], windows)
        self.position = Position(**{**stored, "batch": data.first_batch})
        self._random_states, self._is_restored = checkpoint["random_states"], False
        checkpoint["loops"]["fit_loop"].update(_counters(self.position, checkpoint["global_step"]))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell Lightning's loops, which have their counters by now, how to begin."""
        if self.position is None:
            return
        fit_loop, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        self._is_inside_epoch = self.position.batch > 0
        if self.position.batch == 0:  # a new epoch; with max_steps, Lightning calls that a restart
            fit_loop._restarting = loop._restarting = loop.val_loop._restarting = False
        elif not (self.position.is_unvalidated and _is_validation_due(trainer)):
            loop._restart_stage = "none"  # else a validation that would fall here is done again, or counts as a step
            loop._batches_that_stepped += loop._should_accumulate()

    def _restore_random_states(self, trainer: Trainer) -> None:
        if self._is_restored or self._random_states is None:
            return
        self._is_restored = True
        put_random_states(self._random_states, trainer.strategy.root_device)


def is_fitting(trainer: Trainer) -> bool:
    """Whether this is `fit`, past its sanity check: validations have the same hooks elsewhere."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def _data(trainer: Trainer) -> TokenData:
    return cast(TokenData, trainer.datamodule)  # type: ignore[attr-defined]


def _is_validation_due(trainer: Trainer) -> bool:
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def _moved_by_validation(trainer: Trainer) -> dict[str, Any]:
    """What a validation changes of a checkpoint, as it is now: the schedule, with its rates, and the callbacks."""
    schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    callbacks = {callback.state_key: callback.state_dict() for callback in trainer.callbacks}  # type: ignore[attr-defined]
    return copy.deepcopy({"lr_schedulers": schedules, "callbacks": {k: v for k, v in callbacks.items() if v}})


def _counters(position: Position, steps: int) -> dict[str, Any]:
    """The state of Lightning's fit loop at a position, after that many optimizer steps."""

    def counts(done: int, begun: int | None = None) -> dict[str, int]:
        begun = done if begun is None else begun
        return {"ready": begun, "started": begun, "processed": done, "completed": done}

    def both(total: dict[str, int], current: dict[str, int]) -> dict[str, dict[str, int]]:
        return {"total": total, "current": current}

    epochs = counts(position.epoch, position.epoch + (position.batch > 0))
    validation = counts(0, int(position.is_unvalidated))  # begun and not processed: Lightning begins it again
    step, zero_grad = {"ready": steps, "completed": steps}, {"ready": steps, "started": steps, "completed": steps}
    return {
        "epoch_progress": both(epochs, dict(epochs)),
        "epoch_loop.batch_progress": {
            **both(counts(position.total_batches), counts(position.batch)),
            "is_last_batch": position.ends_epoch,
        },
        "epoch_loop.automatic_optimization.optim_progress": {
            "optimizer": {"step": both(step, dict(step)), "zero_grad": both(zero_grad, dict(zero_grad))}
        },
        "epoch_loop.val_loop.batch_progress": {**both(validation, counts(0)), "is_last_batch": False},
        # the last step of an epoch under way is counted once more when the loop begins
        "epoch_loop.state_dict": {"_batches_that_stepped": steps - (position.batch > 0)},
    }


def _forget_scores(checkpoint: dict[str, Any]) -> None:
    """Drop what was measured on other data: the best loss of the schedule and of the callbacks that keep one."""
    for schedule in checkpoint["lr_schedulers"]:
        schedule.update(best=float("inf"), num_bad_epochs=0)
    states = checkpoint["callbacks"]
    scores = {"best_k_models", "best_score"}
    checkpoint["callbacks"] = {key: state for key, state in states.items() if not scores & set(state)}

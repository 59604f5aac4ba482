"""Where a run stands between two optimizer steps, and how it goes on there, exact to the bit.

Lightning restores weights, optimizer, scheduler and its counters. It restores neither random states nor the place in
the data, and from its counters alone some places are not found again. So every checkpoint says here where the run
stands, in words of its own, and a resumed run's counters are set from that.
"""

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from slm.data import TokenData
from slm.errors import NotFiniteError, check
from slm.run.lightning_internals import (
    begin_after_validation,
    begin_with_a_new_epoch,
    count_a_batch_that_stepped,
    counters,
    is_validation_due,
)


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

    A checkpoint that is written between the batches of one step stands where that step began: no weight has changed
    since. Place this callback first, so that no other has acted on a batch before it.

    Attributes:
        position: where a checkpoint written now would stand; None before the first batch.
        is_between_steps: whether no batch of the next step is trained yet.
    """

    def __init__(self) -> None:
        self.position: Position | None = None
        self.is_between_steps = True
        self._random_states: dict[str, Any] | None = None  # at the position; None: the present ones
        self._is_half_done = False
        self._is_restored = True

    @property
    def can_be_kept(self) -> bool:
        """Whether a checkpoint written now has a position, and nothing in it is newer than that."""
        return self.position is not None and self.position.total_batches > 0 and not self._is_half_done

    # ---- where the run stands

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._restore_random_states(trainer)
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
        self.is_between_steps = is_step_over(trainer, batch_idx)
        if self.is_between_steps:
            self.position = Position(
                trainer.current_epoch,
                batch_idx + 1,
                trainer.fit_loop.epoch_loop.batch_progress.total.ready,
                ends_epoch=_is_epoch_over(trainer, batch_idx),
                is_unvalidated=is_validation_due(trainer),
            )
            self._random_states = None
            # is_between_steps stays False until Lightning has logged this step, after this hook

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_fitting(trainer):
            self._restore_random_states(trainer)
            # no run would come back to a validation after the last of max_steps
            self._is_half_done = 0 < trainer.max_steps <= trainer.global_step
            self._random_states = self._random_states or take_random_states(trainer.strategy.root_device)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_fitting(trainer):
            self._is_half_done = True  # until the schedule has moved and the best checkpoint is chosen

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.position is not None and is_fitting(trainer):
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
        states = self._random_states or take_random_states(trainer.strategy.root_device)
        checkpoint["random_states"], *checkpoint["other_random_states"] = of_all_ranks(states)

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
        position = self.position = Position(**{**stored, "batch": data.first_batch})
        of_each = [checkpoint["random_states"], *checkpoint.get("other_random_states", [])]
        self._random_states = of_each[trainer.global_rank] if trainer.global_rank < len(of_each) else None
        self._is_restored = self._random_states is None
        place = (position.epoch, position.batch, position.total_batches, position.ends_epoch, position.is_unvalidated)
        checkpoint["loops"]["fit_loop"].update(counters(checkpoint["global_step"], *place))
        is_fused = getattr(trainer.precision_plugin, "scaler", None) is None
        adapt_states(checkpoint, pl_module.hparams, is_fused)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell Lightning's loops, which have their counters by now, how to begin."""
        _refuse_validation_inside_a_step(trainer)
        if trainer.global_rank > 0 and self._random_states is None:
            seed_rank(trainer.global_rank, trainer.global_step)
        if self.position is None:
            return
        if self.position.batch == 0:
            begin_with_a_new_epoch(trainer)
        elif not (self.position.is_unvalidated and is_validation_due(trainer)):
            begin_after_validation(trainer)
            if not is_step_over(trainer, self.position.batch - 1):  # as when the batches of a step were other ones
                count_a_batch_that_stepped(trainer)

    def _restore_random_states(self, trainer: Trainer) -> None:
        if self._is_restored or self._random_states is None:
            return
        self._is_restored = True
        put_random_states(self._random_states, trainer.strategy.root_device)


def is_fitting(trainer: Trainer) -> bool:
    """Whether this is `fit`, past its sanity check: validations have the same hooks elsewhere."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def is_step_over(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the optimizer steps after this batch."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or _is_epoch_over(trainer, batch_idx)


def _is_epoch_over(trainer: Trainer, batch_idx: int) -> bool:
    return trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches


def _refuse_validation_inside_a_step(trainer: Trainer) -> None:
    """Refuse validations between the batches of one optimizer step, where no run could be stopped and go on."""
    every, several, epoch = trainer.val_check_batch, trainer.accumulate_grad_batches, trainer.num_training_batches
    if several == 1 or every is None or not trainer.enable_validation:
        return
    is_counted_on = trainer.check_val_every_n_epoch is None  # over the ends of epochs
    is_fine = (every >= epoch and not is_counted_on) or every % several == 0
    check(
        is_fine and (not is_counted_on or epoch % several == 0),
        f"trainer.val_check_interval={every} batches (of {epoch} in an epoch) falls inside a step of "
        f"accumulate_grad_batches={several}: give multiples of that, or validate at the end of an epoch",
    )


def _data(trainer: Trainer) -> TokenData:
    return cast(TokenData, trainer.datamodule)  # type: ignore[attr-defined]


def take_random_states(device: torch.device) -> dict[str, Any]:
    """Those of Python, NumPy, torch on the CPU, and torch on this device, as tensors and plain values."""
    state: Any = np.random.get_state()
    name, words, *rest = state
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    states["numpy"] = (name, words.tolist(), *rest)  # an array would not load with weights_only
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def of_all_ranks(states: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of all processes, by rank; every process must call this."""
    if not (dist.is_available() and dist.is_initialized()):
        return [states]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, states)
    return gathered


def seed_rank(rank: int, step: int) -> None:
    """Give a process dropout masks of its own, which the one seed of the run would make equal on all."""
    digest = blake2b(f"{torch.initial_seed()} {rank} {step}".encode(), digest_size=4).digest()
    seed = int.from_bytes(digest, "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def put_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Put states back; those of another kind of device are left out."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])


def adapt_states(checkpoint: dict[str, Any], hparams: Mapping[str, Any], fused: bool) -> None:
    """Let `hparams` win over those that the optimizer and the schedule of a checkpoint were saved with."""
    stored = checkpoint["hyper_parameters"]
    changed = {name for name, value in hparams.items() if stored.get(name, value) != value}
    for state in checkpoint.get("optimizer_states", []):
        for group in state["param_groups"]:
            if "fused" in group:
                group["fused"] = fused
            if "weight_decay" in changed and group is not state["param_groups"][-1]:
                group["weight_decay"] = hparams["weight_decay"]
            if "learning_rate" in changed:
                group["lr"] = hparams["learning_rate"]
    for schedule in checkpoint.get("lr_schedulers", []):
        for name, entry in (("plateau_factor", "factor"), ("plateau_patience", "patience")):
            if name in changed and entry in schedule:
                schedule[entry] = hparams[name]
        if "learning_rate" in changed:
            schedule["_last_lr"] = [hparams["learning_rate"]] * len(schedule["_last_lr"])
        if "min_learning_rate" in changed and "min_lrs" in schedule:
            schedule["min_lrs"] = [hparams["min_learning_rate"]] * len(schedule["min_lrs"])


def _forget_scores(checkpoint: dict[str, Any]) -> None:
    """Drop what was measured on other data: the best loss of the schedule and of the callbacks that keep one."""
    for schedule in checkpoint["lr_schedulers"]:
        if "best" in schedule:
            schedule.update(best=float("inf"), num_bad_epochs=0)
    states = checkpoint["callbacks"]
    scores = {"best_k_models", "best_score"}
    checkpoint["callbacks"] = {key: state for key, state in states.items() if not scores & set(state)}

"""One optimizer step: the loss and the gradient of its batches together, and whether these are finite."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slm.errors import NotFiniteError


def is_logged(trainer: Any, step: int) -> bool:
    """Whether Lightning passes on what is logged at a step, counted from 1.

    `self.log` takes a third of a millisecond, so it is called at these steps alone.
    """
    interval = trainer.log_every_n_steps
    return bool(interval and step % interval == 0)


class Step:
    """The batches that make one optimizer step: its loss is the mean over all their tokens, on all devices.

    With `accumulate_grad_batches=n`, Lightning divides every batch's loss by n and adds up the gradients. That is wrong
    where an epoch ends with a smaller batch, which counts too much, or with fewer batches, whose gradient is too small.
    Over devices torch takes the mean, which is wrong where the last batch has fewer windows on one than on another.
    """

    def __init__(self) -> None:
        self._first_tokens = 0
        self._weight = 0.0
        self._loss: Tensor | None = None

    def add(self, loss: Tensor, num_tokens: int, num_devices: int = 1, tokens_on_all: int | None = None) -> Tensor:
        """The mean loss of a batch, weighted so that the mean over the devices is that over the step's tokens.

        Args:
            loss: of this device's share of the batch.
            num_tokens: in this share; 0 for one that does not count.
            num_devices: that share the batch.
            tokens_on_all: in the batch on all of them; None on a single device.
        """
        tokens_on_all = num_tokens if tokens_on_all is None else tokens_on_all
        self._first_tokens = self._first_tokens or tokens_on_all
        weight = num_devices * num_tokens / self._first_tokens
        weighted = loss if weight == 1 else loss * weight
        self._weight += tokens_on_all / self._first_tokens
        self._loss = weighted.detach() if self._loss is None else self._loss + weighted.detach()
        return weighted

    def mean_loss(self) -> Tensor:
        """Over all tokens of the step, once the mean over the devices is taken."""
        assert self._loss is not None
        return self._loss if self._weight == 1 else self._loss / self._weight

    def rescale(self, gradients: Sequence[Tensor], num_batches: int) -> None:
        """Make the sum of the gradients, each divided by `num_batches`, that of the mean loss over all tokens."""
        if self._weight not in (0.0, float(num_batches)):
            for gradient in gradients:
                gradient.mul_(num_batches / self._weight)


class FiniteGuard:
    """Keeps a loss or a gradient that is not finite from changing a weight.

    A CPU knows at once, and the error is raised before the step. A GPU computes behind the program, which would have to
    wait for it: there the optimizer is told to skip this step and all after it, through `found_inf`, a tensor that
    torch's fused optimizers read on the device, and the error is raised when `look` is next called.

    Args:
        raises_at_once: whether looking at a value costs nothing, as on a CPU.
    """

    def __init__(self, raises_at_once: bool) -> None:
        self.raises_at_once = raises_at_once
        self._first_bad: Tensor | None = None

    def check(
        self,
        loss: Tensor,
        norm: Tensor,
        step: int,
        scaler: torch.amp.GradScaler | None,
        optimizer: torch.optim.Optimizer,
        may_wait: bool,
    ) -> None:
        """Raise NotFiniteError, or have the step skipped, where the loss or its gradient is not finite.

        With a GradScaler, a gradient that overflows is left to it: it skips the step and halves its scale. It skips a
        loss that is not finite in the same way, which a GPU then tells only where that very step is waited for.

        Args:
            loss: of the step.
            norm: of its gradient.
            step: its number, counted from 0.
            scaler: of float16, if any.
            optimizer: which is about to take the step.
            may_wait: whether to wait for a GPU and raise now.
        """
        is_finite = torch.isfinite(loss + norm)
        if scaler is None and not self.raises_at_once:
            self._skip_unless(is_finite, step, optimizer)
            if may_wait:
                self.look()
        elif (may_wait or self.raises_at_once) and not is_finite:
            if not torch.isfinite(loss):
                raise NotFiniteError(f"step {step}: the loss, {loss.item()},")
            if scaler is None or scaler.get_scale() <= 1:
                raise NotFiniteError(f"step {step}: the norm of the gradient, {norm.item()},")

    def look(self) -> None:
        """Raise NotFiniteError, naming the first step that was skipped, if there is one."""
        if self._first_bad is not None and (first_bad := int(self._first_bad)) >= 0:
            raise NotFiniteError(f"step {first_bad}: the loss or the norm of the gradient")

    def _skip_unless(self, is_finite: Tensor, step: int, optimizer: Any) -> None:
        if self._first_bad is None:
            self._first_bad = torch.full((), -1, dtype=torch.int64, device=is_finite.device)
        is_first = ~is_finite & (self._first_bad < 0)
        self._first_bad = torch.where(is_first, step, self._first_bad)
        optimizer.found_inf = (self._first_bad >= 0).float()

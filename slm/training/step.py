"""One optimizer step: what its batches add up to, and whether that is finite."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slm.errors import NotFiniteError


def is_logged(trainer: Any, step: int) -> bool:
    """Whether Lightning passes on what is logged at a step, counted from 1.

    A `self.log` costs a third of a millisecond: none is called at other steps.
    """
    interval = trainer.log_every_n_steps
    return bool(interval and step % interval == 0)


class Step:
    """The batches whose gradients make one optimizer step, each with the weight of its tokens.

    Lightning adds up the gradients of n batches, each divided by n. With fewer batches at an epoch's end that is too
    little: a step with one of two batches would be taken at half its gradient.
    """

    def __init__(self) -> None:
        self._first_tokens = 0
        self._weight = 0.0
        self._loss: Tensor | None = None

    def add(self, loss: Tensor, num_tokens: int) -> Tensor:
        """The mean loss of a batch, times its share of tokens; the first batch's is 1."""
        self._first_tokens = self._first_tokens or num_tokens
        weight = num_tokens / self._first_tokens
        weighted = loss if weight == 1 else loss * weight
        self._weight += weight
        self._loss = weighted.detach() if self._loss is None else self._loss + weighted.detach()
        return weighted

    def mean_loss(self) -> Tensor:
        """Over all tokens of the step on this device."""
        assert self._loss is not None
        return self._loss if self._weight == 1 else self._loss / self._weight

    def rescale(self, gradients: Sequence[Tensor], num_batches: int) -> None:
        """Make the gradients, divided by `num_batches`, those of the mean loss over all tokens of the step."""
        if self._weight not in (0.0, float(num_batches)):
            for gradient in gradients:
                gradient.mul_(num_batches / self._weight)


class FiniteGuard:
    """Keeps a loss or a gradient that is not finite from changing a weight.

    Where looking costs nothing, as on a CPU, it raises before the step. A GPU would have to be waited for: there it
    tells the fused optimizer, by the tensor `found_inf` that such optimizers read, to leave out this step and all
    after it, and raises when it is next asked to look.

    Args:
        is_free: whether looking costs nothing.
    """

    def __init__(self, is_free: bool) -> None:
        self.is_free = is_free
        self._first_bad: Tensor | None = None

    def check(
        self,
        loss: Tensor,
        norm: Tensor,
        step: int,
        scaler: torch.amp.GradScaler | None,
        optimizer: torch.optim.Optimizer,
        is_looking: bool,
    ) -> None:
        """Raise NotFiniteError, naming the step, where the loss or the norm of its gradient is not finite.

        A gradient that a GradScaler made overflow is left to it, which leaves the step out and halves its scale.
        """
        is_finite = torch.isfinite(loss + norm)
        if scaler is None and not self.is_free:
            self._leave_out(is_finite, step, optimizer)
            assert self._first_bad is not None
            if is_looking and (first_bad := int(self._first_bad)) >= 0:
                raise NotFiniteError(f"step {first_bad}: the loss or the norm of the gradient")
        elif (is_looking or self.is_free) and not is_finite:
            if not torch.isfinite(loss):
                raise NotFiniteError(f"step {step}: the loss, {loss.item()},")
            if scaler is None or scaler.get_scale() <= 1:
                raise NotFiniteError(f"step {step}: the norm of the gradient, {norm.item()},")

    def _leave_out(self, is_finite: Tensor, step: int, optimizer: Any) -> None:
        if self._first_bad is None:
            self._first_bad = torch.full((), -1, dtype=torch.int64, device=is_finite.device)
        is_first = ~is_finite & (self._first_bad < 0)
        self._first_bad = torch.where(is_first, step, self._first_bad)
        optimizer.found_inf = (self._first_bad >= 0).float()

"""What the batches of one optimizer step add up to."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slm.errors import NotFiniteError


class AccumulationWindow:
    """The batches whose gradients make one optimizer step, each with the weight of its tokens.

    Lightning adds up the gradients of n batches, each divided by n. With fewer batches at an epoch's end that is too
    little: a step with one of two batches would be taken at half its gradient.
    """

    def __init__(self) -> None:
        self._first_tokens = 0
        self._weight = 0.0
        self._loss: Tensor | None = None

    def weigh(self, loss: Tensor, num_tokens: int) -> Tensor:
        """The mean loss of a batch, times its share of tokens; the first batch's is 1."""
        self._first_tokens = self._first_tokens or num_tokens
        weight = num_tokens / self._first_tokens
        self._weight += weight
        return loss if weight == 1 else loss * weight

    def add_loss(self, loss: Tensor) -> None:
        """Take note of what is differentiated."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def rescale(self, gradients: Sequence[Tensor], num_batches: int) -> None:
        """Make the gradients, divided by `num_batches`, those of the mean loss over all tokens of the window."""
        if self._weight not in (0.0, float(num_batches)):
            for gradient in gradients:
                gradient.mul_(num_batches / self._weight)

    def check_finite(self, norm: Tensor, scaler: torch.amp.GradScaler | None, step: int) -> None:
        """Raise NotFiniteError, naming the step, where the loss or the norm of its gradient is not finite.

        A gradient that a GradScaler made overflow is left to it, which leaves the step out and halves its scale.
        """
        loss = norm if self._loss is None else self._loss
        if torch.isfinite(loss + norm):  # one answer to wait for
            return
        if not torch.isfinite(loss):
            raise NotFiniteError(f"step {step}: the loss, {loss.item()},")
        if scaler is None or scaler.get_scale() <= 1:
            raise NotFiniteError(f"step {step}: the norm of the gradient, {norm.item()},")

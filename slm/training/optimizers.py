"""Which optimizer steps which parameters, and the learning rate of every step."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slm.errors import check
from slm.hardware import fast_dtype
from slm.training.shards import is_sharded, local, sharded_like, whole_like

MOMENTUM = 0.95
"""Of Muon."""
ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration, as Jordan chose them."""
SMALLEST_NORM = 1e-7
"""A gradient is divided by its norm, or by this if it is larger: one that is nearly 0 makes a smaller step."""


def build_optimizer(network: nn.Module, hparams: Mapping[str, Any], fused: bool) -> torch.optim.Optimizer:
    """The optimizer that `hparams["optimizer"]` names; matrices decay, biases and norms do not.

    Args:
        network: its parameters are stepped.
        hparams: `optimizer`, `learning_rate` and `weight_decay`.
        fused: whether one kernel steps all parameters of AdamW, Adam or SGD; else torch chooses how.
    """
    parameters = list(network.parameters())
    decayed = {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": hparams["weight_decay"]}
    others = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
    settings: dict[str, Any] = {"lr": hparams["learning_rate"], "fused": fused or None}
    if hparams["optimizer"] == "adamw":
        return torch.optim.AdamW([decayed, others], **settings)
    if hparams["optimizer"] == "adam":
        return torch.optim.Adam([decayed, others], **settings)
    if hparams["optimizer"] == "sgd":
        if is_sharded(network):  # torch's kernel does not take shards
            settings["fused"] = None
        return torch.optim.SGD([decayed, others], momentum=0.9, **settings)
    embeddings = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    embeddings.add(id(getattr(network, "output_weight", None)))
    hidden = {**decayed, "params": [p for p in decayed["params"] if id(p) not in embeddings]}
    decayed["params"] = [p for p in decayed["params"] if id(p) in embeddings]
    return MuonWithAdamW(hidden, [decayed, others], **settings)


def stepped_by(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters of all its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for the matrices inside the network, AdamW for embeddings, biases and norms.

    One optimizer, so that the Trainer clips, accumulates and saves as it does with any other. Muon's steps are scaled
    to the size of AdamW's (Liu et al., 2025, "Muon is Scalable for LLM Training"), so that one learning rate fits both.
    torch's own Muon computes in bf16 on every processor and takes one matrix after another: on a processor without bf16
    the small text recipe then trained at an eighth of AdamW's speed.

    Args:
        matrices: the parameter group that Muon steps; of more than two dimensions, the last two are a matrix.
        others: the parameter groups that AdamW steps.
        lr: the learning rate of all of them.
        fused: of AdamW, as torch takes it.
    """

    found_inf: Tensor | None = None
    """1.0 to skip this step, as torch's fused optimizers read it; None means 0.0."""

    def __init__(self, matrices: dict[str, Any], others: list[dict[str, Any]], lr: float, fused: bool | None) -> None:
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), fused=fused)
        super().__init__([{"lr": lr, "weight_decay": 0.0, **matrices}, *self._adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let AdamW work on this optimizer's groups and state."""
        self._adamw.param_groups, self._adamw.state = self.param_groups[1:], self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for name in self.param_groups[0].keys() - {"params", "lr", "initial_lr", "weight_decay"}:
            del self.param_groups[0][name]  # of torch's own Muon, which older checkpoints were trained with
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._step_matrices()
        self._adamw.step()
        return loss

    @torch.no_grad()
    def _step_matrices(self) -> None:
        group = self.param_groups[0]
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        gradients = [local(p.grad) for p in parameters]
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        momenta = [local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        is_taken = None if self.found_inf is None else self.found_inf == 0
        if is_taken is not None:  # the mean of a momentum and itself leaves it as it is
            gradients = [torch.where(is_taken, g, m) for g, m in zip(gradients, momenta, strict=True)]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        updates = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's
        together: dict[Any, list[int]] = {}
        for index, parameter in enumerate(parameters):  # one after another where each must be gathered first
            key = index if isinstance(parameter, DTensor) else parameter.shape
            together.setdefault(key, []).append(index)
        for indices in together.values():
            steps = orthogonalized(torch.stack([whole_like(parameters[index], updates[index]) for index in indices]))
            rate = 0.2 * math.sqrt(max(steps.shape[-2:])) * group["lr"]
            for index, whole_step in zip(indices, steps, strict=True):
                step, weights = local(sharded_like(parameters[index], whole_step)), local(parameters[index])
                moved = (weights * (1 - group["lr"] * group["weight_decay"])).sub_(step, alpha=rate)
                weights.copy_(moved if is_taken is None else torch.where(is_taken, moved, weights))


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices (..., M, N) with their singular values brought to about 1, between 0.7 and 1.2 but for tiny ones.

    By the Newton-Schulz iteration, in the type that the device multiplies fastest, or in 64 bits if they are given so.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    dtype = torch.float64 if matrices.dtype == torch.float64 else fast_dtype(matrices.device)
    wide = (matrices.mT if is_tall else matrices).to(dtype)
    x = wide.reshape(-1, *wide.shape[-2:])  # (K, M, N), M <= N
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=SMALLEST_NORM)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.view(wide.shape)
    return x.mT if is_tall else x


def matmul_flops(optimizer: torch.optim.Optimizer) -> int:
    """Floating-point operations of the matrix products in a step of an optimizer: Muon's, none in any other."""
    if not isinstance(optimizer, MuonWithAdamW):
        return 0
    flops = 0
    for matrices in optimizer.param_groups[0]["params"]:
        m, n = sorted(matrices.shape[-2:])
        flops += matrices.numel() // (m * n) * ITERATIONS * (4 * m * m * n + 2 * m**3)
    return flops


def cosine_rate(step: int, num_steps: float, hparams: Mapping[str, Any]) -> float:
    """Learning rate of the step with this number: linear warm-up, then half a cosine (Loshchilov and Hutter, 2017)."""
    peak, warmup, end = (hparams[name] for name in ("learning_rate", "warmup_steps", "min_learning_rate"))
    if step < warmup:
        return float(peak * (step + 1) / (warmup + 1))
    done = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    return float(end + (peak - end) * 0.5 * (1.0 + math.cos(math.pi * done)))


def num_steps(trainer: Any) -> int:
    """Optimizer steps of a Trainer's whole run, once it has begun.

    Raises:
        InputError: it has no end in steps or epochs.
    """
    limits = [trainer.max_steps] if trainer.max_steps > 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        limits.append(trainer.max_epochs * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches))
    check(
        bool(limits),
        "schedule=cosine and short_context_steps need an end: give --trainer.max_epochs or --trainer.max_steps",
    )
    return int(min(limits))

"""Training that is sharded by FSDP2: the strategy `fsdp2`, and weights given to a model that may be sharded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy

from slm.run.checkpoint import load_weights
from slm.training.language_model import LanguageModel
from slm.training.optimizers import stepped_by
from slm.training.shards import is_sharded, scatter_weights, sharded_like, whole


class FullySharded(ModelParallelStrategy):
    """Leaves each device a shard of every weight, gradient and optimizer state; `configure_model` of a model shards it.

    A checkpoint is gathered into one file, the same as of any other run. So it goes on under any number of processes,
    and all that reads checkpoints reads it: generation, export, the table of runs, the check of its CRC. The price is
    that rank 0 holds the whole state in the memory of its node while it writes, and each rank while it reads, when a
    run goes on: 12 bytes a parameter, 12 GB for a model of a billion. Lightning's folder of shards, written by all
    ranks at once, would pay from about ten times that on.

    Lightning's own `load_checkpoint` reads the file past the CheckpointIO and gives the model what it reads before any
    hook can adapt that. Here a checkpoint is read by the CheckpointIO, and loaded when it is under any other strategy.

    Args:
        num_processes: of the whole run.
    """

    def __init__(self, num_processes: int) -> None:
        super().__init__(num_processes, tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        scatter_weights(self.lightning_module, checkpoint["state_dict"], strict)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The whole state, on the CPU of rank 0; nothing on the others, which must call this too."""
        state = optimizer.state_dict()
        gathered = {
            number: {name: self._gathered(value) for name, value in values.items()}
            for number, values in state["state"].items()
        }
        return {**state, "state": gathered} if self.is_global_zero else {}

    def _gathered(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        tensor = whole(value)
        return tensor.cpu() if self.is_global_zero else None  # one at a time: no device has room for all

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = map(_sharded_state, self.optimizers, checkpoint["optimizer_states"])
        ParallelStrategy.load_optimizer_state_dict(self, {"optimizer_states": list(states)})


def _sharded_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The whole state of an optimizer with this process's shards in it, and fused where the optimizer is."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    of_each = {
        number: {
            name: sharded_like(parameter, value) if getattr(value, "shape", None) == parameter.shape else value
            for name, value in state["state"].get(number, {}).items()
        }
        for number, parameter in zip(numbers, stepped_by(optimizer), strict=True)
    }
    groups = [
        {**group, "fused": own["fused"]} if "fused" in group else group
        for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {"state": of_each, "param_groups": groups}


def give_weights(model: LanguageModel, content: dict[str, Any] | None, path: Path) -> None:
    """Give a model, sharded or not, the weights in the content of a checkpoint; all processes must call this.

    Args:
        model: whose weights on rank 0 count, where it is not sharded: Lightning gives them to the others.
        content: on rank 0; None elsewhere.
        path: of the checkpoint.

    Raises:
        InputError: they do not fit.
    """
    if not is_sharded(model.transformer):
        if content is not None:
            load_weights(model.transformer, content, path)
        return
    state = {} if content is None else content["state_dict"]
    weights = {name.removeprefix("transformer."): value for name, value in state.items()}
    scatter_weights(model.transformer, weights)

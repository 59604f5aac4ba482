"""Weights shared out among devices by FSDP2 (Zhao et al., 2023, and `torch.distributed.fsdp.fully_shard`).

Each device holds a shard, which is some of the rows, of every weight, of its gradient and of its optimizer state: these
are DTensors then. What is computed from a shard alone is done on the plain tensor in it; what is not, gathers it first.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint


def shard(network: Any, mesh: DeviceMesh) -> None:
    """Leave each device its shard of a network that rank 0 holds whole; all devices must call this.

    The weights of a block are gathered while it computes. All others, which are the embeddings and the last norm, stay
    gathered from the forward pass to the end of the backward pass: the loss takes the tied embedding in between.

    Args:
        network: with `blocks`. Only its weights on rank 0 matter: elsewhere they may be on the meta device.
        mesh: the devices, in one dimension.
    """
    whole_state = network.state_dict()
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh, reshard_after_forward=False)
    if any(parameter.is_meta for parameter in network.parameters()):
        network.to_empty(device=mesh.device_type)
    scatter_weights(network, whole_state)
    for buffer in network.buffers():  # also those that are in no state_dict
        dist.broadcast(buffer, 0)


def is_sharded(network: nn.Module) -> bool:
    return isinstance(network, FSDPModule)


def scatter_weights(network: nn.Module, state: Mapping[str, Any], strict: bool = True) -> None:
    """Give each device its shards of whole weights; all devices must call this, and the state of rank 0 counts."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=strict)
    set_model_state_dict(network, dict(state) if dist.get_rank() == 0 else {}, options=options)


def local(tensor: Tensor) -> Tensor:
    """The shard of a tensor that is here, in the same memory; the tensor itself where it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from all devices, which must all call this; itself where it is whole."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_like(parameter: Tensor, shard: Tensor) -> Tensor:
    """A tensor of which every device gives the shard that belongs to its shard of a parameter."""
    if not isinstance(parameter, DTensor):
        return shard
    place: Any = {"device_mesh": parameter.device_mesh, "placements": parameter.placements, "run_check": False}
    return DTensor.from_local(shard, **place, shape=parameter.shape, stride=parameter.stride()).full_tensor()


def sharded_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, which is the same on all devices, shared out as a parameter is; nothing is communicated."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def recompute_activations(blocks: Iterable[nn.Module]) -> None:
    """Let blocks keep their input alone for the backward pass, and compute the rest again there, with the same dropout.

    What is changed is `forward` of each, inside the hooks of its call, by which FSDP2 gathers its weights: the names of
    the weights stay, and without gradients nothing is different.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)

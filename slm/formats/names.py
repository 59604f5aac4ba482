"""The weights of a network here under the names that another program gives them, and back.

V vocabulary, D embedding, H heads of queries, K heads of keys and values.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Names(NamedTuple):
    """What another program calls the layers of a family.

    Args:
        block: what stands before the layers of a block, with `{}` for its number.
        layers: its name of each layer here; of `attn.qkv`, the one name or the three of queries, keys and values.
        is_transposed: whether it keeps the matrices of linear layers as (in, out).
    """

    block: str
    layers: Mapping[str, str | tuple[str, ...]]
    is_transposed: bool = False

    def theirs(self, state: Mapping[str, Tensor], num_heads: int, num_kv_heads: int) -> dict[str, Tensor]:
        """The weights of a Transformer under their names."""
        found: dict[str, Tensor] = {}
        for name, weights in state.items():
            names, is_linear = self._their_names(name)
            parts = [weights] if len(names) == 1 else _split(weights, num_heads, num_kv_heads)
            found |= zip(names, (self._transposed(part, is_linear) for part in parts), strict=True)
        return found

    def ours(self, state: Mapping[str, Tensor], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The weights of these names of a Transformer, out of theirs; raises KeyError where one is missing."""
        for name in names:
            their_names, is_linear = self._their_names(name)
            yield name, torch.cat([self._transposed(state[their_name], is_linear) for their_name in their_names])

    def _their_names(self, name: str) -> tuple[list[str], bool]:
        """Theirs for a name here, and whether it is of the matrix of a linear layer."""
        parts = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", name)
        assert parts is not None
        number, layer, kind = parts.groups()
        names = self.layers[layer]
        before = "" if number is None else self.block.format(number)
        is_linear = kind == "weight" and not layer.endswith(("embedding", "norm", "output"))
        return [f"{before}{their}.{kind}" for their in ([names] if isinstance(names, str) else names)], is_linear

    def _transposed(self, weights: Tensor, is_linear: bool) -> Tensor:
        return (weights.T if self.is_transposed and is_linear else weights).contiguous()


def _split(weights: Tensor, num_heads: int, num_kv_heads: int) -> Sequence[Tensor]:
    """The rows of queries, of keys and of values in the matrix or bias of `attn.qkv`."""
    head_dim = len(weights) // (num_heads + 2 * num_kv_heads)
    return torch.split(weights, [head_dim * heads for heads in (num_heads, num_kv_heads, num_kv_heads)])

"""Which window of a token stream comes when: a function of (seed, epoch, position), so that a run can stop and go on.

N tokens in the stream, T tokens in a window, M positions.
"""

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler

ROUNDS = 8
CHUNK = 4096
"""Positions that are looked up at once."""
WORD = 0xFFFF_FFFF


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Consecutive windows over a stream (N,): item k is tokens kT to kT+T and the same one later, each (T,), int64.

    Every token but the first is the target of at most one window; what is left at the end is shorter than a window.
    """

    def __init__(self, stream: Tensor, seq_len: int) -> None:
        self.stream = stream
        self.seq_len = seq_len

    def __len__(self) -> int:
        return max(0, len(self.stream) - 1) // self.seq_len

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.seq_len
        window = self.stream[start : start + self.seq_len + 1].long()
        return window[:-1], window[1:]


def shuffled(positions: Tensor, size: int, seed: int, epoch: int) -> Tensor:
    """The items (M,), int64, that stand at these positions (M,) in the order of range(size) that belongs to the epoch.

    A Feistel network (Luby and Rackoff, 1988) permutes the numbers of 2h bits, the smallest such set that holds
    range(size); a number outside goes through it again until it is inside (Black and Rogaway, 2002). Nothing is kept
    in memory, whatever the size, up to 2**62.
    """
    half = max(3, ((size - 1).bit_length() + 1) // 2)
    digest = blake2b(f"{seed} {epoch}".encode(), digest_size=4 * ROUNDS).digest()
    keys = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, len(digest), 4)]
    items = _permute(positions, half, keys)
    while bool((outside := items >= size).any()):
        items[outside] = _permute(items[outside], half, keys)
    return items


def _permute(numbers: Tensor, half: int, keys: list[int]) -> Tensor:
    mask = (1 << half) - 1
    left, right = numbers >> half, numbers & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(words: Tensor) -> Tensor:
    """32-bit words whose every bit depends on all bits of the given ones (xxHash32's final mix)."""
    words = words ^ (words >> 15)
    words = (words * 0x85EB_CA77) & WORD
    words = words ^ (words >> 13)
    words = (words * 0xC2B2_AE3D) & WORD
    return words ^ (words >> 16)


class _Order:
    """An order of windows that begins at any position of an epoch; later epochs begin at 0."""

    epoch = 0
    start = 0

    def start_at(self, epoch: int, start: int) -> None:
        self.epoch, self.start = epoch, start

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch; the one that is under way goes on."""
        if epoch != self.epoch:
            self.start_at(epoch, 0)


class ShuffledOrder(_Order, DistributedSampler[Any]):
    """One device's share of the shuffled windows, each once an epoch.

    Device r of R takes positions r, r + R, ...; of a number of windows that R does not divide, the last few positions
    of each epoch are left out. A DistributedSampler, because Lightning replaces any other on several devices.
    """

    def __init__(self, windows: Windows, seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(windows, num_replicas, rank, seed=seed)
        self.size = len(windows)
        self.num_samples = self.size // num_replicas

    def __iter__(self) -> Iterator[int]:
        for first in range(self.start, len(self), CHUNK):
            positions = torch.arange(first, min(first + CHUNK, len(self))) * self.num_replicas + self.rank
            yield from shuffled(positions, self.size, self.seed, self.epoch).tolist()


class StreamOrder(_Order, SequentialSampler):
    """The windows as they stand in the stream: what `overfit_batches` wants."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, len(self)))

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
    Item (k, s) is window k moved by s tokens, or as far as the stream has them.
    """

    def __init__(self, stream: Tensor, seq_len: int) -> None:
        self.stream = stream
        self.seq_len = seq_len

    def __len__(self) -> int:
        return max(0, len(self.stream) - 1) // self.seq_len

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        number, shift = index if isinstance(index, tuple) else (index, 0)
        if not 0 <= number < len(self):
            raise IndexError(f"window {number} of {len(self)}")
        start = min(number * self.seq_len + shift, len(self.stream) - 1 - self.seq_len)
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


def shift_of(seq_len: int, seed: int, epoch: int) -> int:
    """How many tokens later the windows of this epoch begin: none in the first, any number below T in the others."""
    digest = blake2b(f"shift {seed} {epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % seq_len if epoch else 0


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
    """One device's share of an order of windows, which begins at any position of an epoch; later epochs begin at 0.

    Device r of R takes positions r, r + R, ... after the first, so that the batches of all devices together are a batch
    of the run. Where its last batch has fewer windows than there are devices, those left without one get a dummy
    window, weighted 0: `share_of` tells which.
    """

    windows: Windows
    batch_size: int
    num_devices: int
    rank: int
    epoch = 0
    start = 0

    def place(self, windows: Windows, batch_size: int, num_devices: int, rank: int) -> None:
        """Give the order its share: `batch_size` windows in a batch on all devices together."""
        self.windows, self.batch_size, self.num_devices, self.rank = windows, batch_size, num_devices, rank

    def start_at(self, epoch: int, start: int) -> None:
        self.epoch, self.start = epoch, start

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch; the one that is under way goes on."""
        if epoch != self.epoch:
            self.start_at(epoch, 0)

    def __len__(self) -> int:
        """Of a whole epoch, wherever this one begins."""
        return self._share_of(len(self.windows))

    def _share_of(self, num_windows: int) -> int:
        batches, last = divmod(num_windows, self.batch_size)
        of_last = max(1, share_of(last, self.num_devices, self.rank)) if last else 0
        return batches * (self.batch_size // self.num_devices) + of_last

    def positions(self) -> Iterator[Tensor]:
        """The positions of this device, some thousands at a time."""
        size = self._share_of(max(0, len(self.windows) - self.start))
        for first in range(0, size, CHUNK):
            indices = torch.arange(first, min(first + CHUNK, size))
            positions = self.start + indices * self.num_devices + self.rank
            yield positions.clamp(max=len(self.windows) - 1)


def share_of(num_windows: int, num_devices: int, rank: int) -> int:
    """How many of the windows of a batch are on one device."""
    return len(range(rank, num_windows, num_devices))


class ShuffledOrder(_Order, DistributedSampler[Any]):
    """The shuffled windows, each once an epoch: a DistributedSampler, which Lightning leaves alone.

    With `shifts`, the stream is cut at other places in each epoch.
    """

    def __init__(
        self,
        windows: Windows,
        seed: int,
        batch_size: int = 1,
        num_devices: int = 1,
        rank: int = 0,
        shifts: bool = False,
    ) -> None:
        super().__init__(windows, num_devices, rank, seed=seed)
        self.place(windows, batch_size, num_devices, rank)
        self.shifts = shifts

    def __iter__(self) -> Iterator[int | tuple[int, int]]:
        shift = shift_of(self.windows.seq_len, self.seed, self.epoch) if self.shifts else 0
        for positions in self.positions():
            for number in shuffled(positions, len(self.windows), self.seed, self.epoch).tolist():
                yield (number, shift) if shift else number


class StreamOrder(_Order, SequentialSampler):
    """The windows as they stand in the stream: what `overfit_batches` wants, and what is held out."""

    def __init__(self, windows: Windows, batch_size: int = 1, num_devices: int = 1, rank: int = 0) -> None:
        super().__init__(windows)
        self.place(windows, batch_size, num_devices, rank)

    def __iter__(self) -> Iterator[int]:
        for positions in self.positions():
            yield from positions.tolist()

"""A stream of tokens as a LightningDataModule: a part held out, all cut into windows, in an order that can be resumed.

B batch, T time (`max_seq_len`): every batch is (tokens (B, T), targets (B, T)), int64.
"""

import math
import signal
import sys
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any
from weakref import WeakSet

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from slm.data.windows import ShuffledOrder, StreamOrder, Windows, share_of
from slm.errors import check

Loader = DataLoader[tuple[Tensor, Tensor]]

SECONDS_TO_STOP = 300
"""How long a worker serves on after a SIGTERM: longer than any scheduler waits for the training process to stop."""


class TokenData(LightningDataModule):
    """Windows over one stream of tokens, the last `val_fraction` of it held out; a subclass says which stream.

    There is one held-out split: `validate`, `test` and `predict` all read the whole of it.

    Args:
        vocab_size: number of token ids, given once, as `--model.vocab_size`.
        max_seq_len: tokens in a window, given once, as `--model.max_seq_len`.
        batch_size: windows in a batch, on all devices together: each takes an equal share. So a run has the same
            steps, and its learning rate the same meaning, on any number of devices.
        val_fraction: share of the stream that is held out.
        seed: of the order of the training windows, and of the dummy tokens.
        num_workers: processes that load batches; 0 loads in the training process.
        shift_windows: whether each epoch but the first cuts the training tokens into windows at other places, so that
            no token has the same context every time.

    Raises:
        InputError: an argument out of range, or (in `setup`) a stream too short for a window in each split.
    """

    tokenizer: str | None = None
    """How text becomes tokens, once they are there: None (no text), `bytes`, or the JSON of a tokenizer."""
    token_bytes: Tensor | None = None
    """How many bytes of text each id (V,) stands for, or all do on average; None where neither is known."""
    optimum: float | None = None
    """The lowest loss that any model can be expected to reach on these windows, in nats per token; None if unknown."""
    unigram: float | None = None
    """The lowest expected loss of a model that ignores the context, in nats per token; None if unknown."""
    best_accuracy: float | None = None
    fingerprint: str | None = None
    """Of its tokens, their split and their order, once they are there."""

    def __init__(
        self,
        vocab_size: int,
        max_seq_len: int,
        batch_size: int = 32,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        shift_windows: bool = False,
    ) -> None:
        super().__init__()
        check(vocab_size >= 1, f"vocab_size={vocab_size} must be at least 1")
        check(max_seq_len >= 1, f"max_seq_len={max_seq_len} must be at least 1")
        check(batch_size >= 1, f"batch_size={batch_size} must be at least 1")
        check(0.0 < val_fraction < 1.0, f"val_fraction={val_fraction} must be above 0 and below 1")
        check(0 <= seed < 2**63, f"seed={seed} must be at least 0 and below 2**63")
        check(num_workers >= 0, f"num_workers={num_workers} must be at least 0")
        self.save_hyperparameters()
        self.train_windows: Windows | None = None
        self.val_windows: Windows | None = None
        self._loaders = WeakSet[Loader]()
        self.start_at(0, 0)

    def stream(self) -> Tensor:
        """The tokens (N,), of any integer type; called once, in `setup`."""
        raise NotImplementedError

    def held_out_stream(self) -> Tensor | None:
        """The tokens that are held out, where they are not the tail of the stream; called once, after `stream`."""
        return None

    def digest(self, stream: Tensor) -> bytes:
        """What tells the streams from all others."""
        return blake2b(stream.contiguous().numpy().data).digest()

    def continue_with(self, tokenizer: str | None) -> None:
        """Before `setup`, take over the tokenizer of a checkpoint; raises InputError where the data has another."""
        refuse_other_tokenizer(tokenizer is None, tokenizer, None)

    def at_a_glance(self, num_parameters: int) -> Iterator[str]:
        """Lines that say, after `setup`, what the data is for a model of that many parameters."""
        return iter(())

    def setup(self, stage: str | None = None) -> None:
        if self.train_windows is not None:
            return
        stream, seq_len = self.stream(), self.hparams["max_seq_len"]
        held_out = self.held_out_stream()
        order = f"{self.hparams['seed']} {self.hparams['val_fraction']}{' shifted' * self.hparams['shift_windows']}"
        self.fingerprint = blake2b(self.digest(stream), digest_size=16, key=order.encode()).hexdigest()
        if held_out is None:
            num_windows = (len(stream) - 1) // seq_len
            check(
                num_windows >= 2,
                f"{len(stream)} tokens are too few: training and validation need a window of max_seq_len={seq_len} "
                f"each, {2 * seq_len + 1} tokens in all; give more data or a smaller --model.max_seq_len",
            )
            num_held_out = min(max(1, round(num_windows * self.hparams["val_fraction"])), num_windows - 1)
            boundary = len(stream) - num_held_out * seq_len  # whole windows, so that every held-out token is a target
            stream, held_out = stream[:boundary], stream[boundary - 1 :]
        for name, part in (("training", stream), ("validation", held_out)):
            check(
                len(part) > seq_len,
                f"{len(part)} tokens are too few for {name}, which needs a window of max_seq_len={seq_len} and one "
                "token more; give more data or a smaller --model.max_seq_len",
            )
        self.train_windows, self.val_windows = Windows(stream, seq_len), Windows(held_out, seq_len)

    def start_at(self, epoch: int, windows: int) -> None:
        """Let `train_dataloader` begin in this epoch, after so many of its windows, counted over all devices."""
        self._start_epoch, self._start_windows = epoch, windows

    @property
    def first_batch(self) -> int:
        """The number of the batch, within its epoch, that `train_dataloader` begins with."""
        assert self.train_windows is not None
        num_windows, batch_size = len(self.train_windows), self.hparams["batch_size"]
        left = max(0, num_windows - self._start_windows)
        return math.ceil(num_windows / batch_size) - math.ceil(left / batch_size)

    def windows_before(self, epoch: int, batch: int) -> int:
        """How many windows of the epoch come before this batch."""
        assert self.train_windows is not None
        first, before = (self.first_batch, self._start_windows) if epoch == self._start_epoch else (0, 0)
        return min(len(self.train_windows), before + (batch - first) * self.hparams["batch_size"])

    def windows_in(self, batch: int, is_training: bool) -> tuple[int, int]:
        """How many windows of a batch are on this device, and how many on all.

        Args:
            batch: its number in the epoch that is under way.
            is_training: whether it is one of the training windows or of those held out.
        """
        assert self.val_windows is not None
        batch_size, share = self.hparams["batch_size"], self._share()
        if is_training:
            assert self.trainer is not None
            epoch = self.trainer.current_epoch
            on_all = self.windows_before(epoch, batch + 1) - self.windows_before(epoch, batch)
        else:
            on_all = min(batch_size, len(self.val_windows) - batch * batch_size)
        return share_of(on_all, **share), on_all

    def train_dataloader(self) -> Loader:
        """The training windows in an order that is a function of (seed, epoch), from where `start_at` says.

        Raises:
            InputError: the devices cannot take equal shares of a batch.
        """
        assert self.train_windows is not None
        order: ShuffledOrder | StreamOrder
        if self.trainer is not None and getattr(self.trainer, "overfit_batches", False):
            order = StreamOrder(self.train_windows, self.hparams["batch_size"], **self._share())
        else:
            shifts = self.hparams["shift_windows"]
            seed, batch_size = self.hparams["seed"], self.hparams["batch_size"]
            order = ShuffledOrder(self.train_windows, seed, batch_size, **self._share(), shifts=shifts)
        order.start_at(self._start_epoch, self._start_windows)
        return self._loader(self.train_windows, order)

    def val_dataloader(self) -> Loader:
        """The held-out windows in their order, each once, whatever the number of devices."""
        assert self.val_windows is not None
        order = StreamOrder(self.val_windows, self.hparams["batch_size"], **self._share())
        return self._loader(self.val_windows, order)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def _share(self) -> dict[str, int]:
        """Which of the devices this process feeds."""
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        check_shares(self.hparams["batch_size"], world_size)
        return {"num_devices": world_size, "rank": rank}

    def _loader(self, windows: Windows, sampler: Sampler[Any]) -> Loader:
        num_workers = self.hparams["num_workers"]
        loader = DataLoader(
            windows,
            batch_size=self.hparams["batch_size"] // self._share()["num_devices"],
            sampler=sampler,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            multiprocessing_context="fork"
            if num_workers and sys.platform == "linux"
            else None,  # shares what is mapped
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_the_parent,
            generator=torch.Generator().manual_seed(self.hparams["seed"]),  # else it draws from the model's numbers
        )
        self._loaders.add(loader)
        return loader

    def on_exception(self, exception: BaseException) -> None:
        self.teardown()

    def teardown(self, stage: str | None = None) -> None:
        """End the workers, which would be waited for when the process exits."""
        for loader in self._loaders:
            if isinstance(loader._iterator, _MultiProcessingDataLoaderIter):
                loader._iterator._shutdown_workers()


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C, and often SIGTERM, reach every process; the training process needs its workers to finish the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def _end_later(signum: int, frame: Any) -> None:
    signal.alarm(SECONDS_TO_STOP)


def check_shares(batch_size: int, num_devices: int) -> None:
    """Raise InputError unless the devices can take equal shares of a batch."""
    near = [n for n in (batch_size // num_devices * num_devices, -(-batch_size // num_devices) * num_devices) if n]
    check(
        batch_size % num_devices == 0,
        f"batch_size={batch_size} windows cannot be shared equally by {num_devices} devices: give --data.batch_size "
        f"{' or '.join(str(size) for size in near)}, or use fewer devices",
    )


def refuse_other_tokenizer(fits: bool, stored: str | None, own: str | None) -> None:
    """Raise InputError unless the tokenizer of a checkpoint fits the data."""
    check(
        fits,
        f"the checkpoint was trained with tokenizer={stored}, the data has tokenizer={own}: name data with "
        "that one with --data or --config",
    )

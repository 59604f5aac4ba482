import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_command, small_data

from slm.data import DummyData
from slm.data.windows import Windows
from slm.errors import InputError


def test_windows_cover_the_stream_and_targets_are_the_tokens_one_later() -> None:
    stream = torch.arange(35, dtype=torch.uint8)
    windows = Windows(stream, seq_len=8)
    assert len(windows) == 4
    for k in range(4):
        tokens, targets = windows[k]
        assert tokens.tolist() == list(range(8 * k, 8 * k + 8))
        assert targets.tolist() == list(range(8 * k + 1, 8 * k + 9))
        assert tokens.dtype == targets.dtype == torch.int64


@pytest.mark.parametrize("index", [-1, 4, 100])
def test_a_window_that_is_not_there_raises_index_error(index: int) -> None:
    with pytest.raises(IndexError):
        Windows(torch.arange(35), seq_len=8)[index]


def test_every_held_out_token_is_a_target_once_and_no_training_target() -> None:
    data = small_data(num_tokens=1003, val_fraction=0.3)
    data.setup()
    assert data.train_windows is not None
    assert data.val_windows is not None
    held_out = len(data.val_windows) * 16
    assert held_out == pytest.approx(0.3 * 1003, abs=16)
    assert len(data.val_windows.stream) == held_out + 1
    assert len(data.train_windows.stream) == 1003 - held_out
    whole = small_data(num_tokens=1003).stream()
    assert torch.equal(torch.cat([data.train_windows.stream, data.val_windows.stream[1:]]), whole)


def test_an_epoch_shows_each_training_window_once_in_an_order_of_its_own() -> None:
    data = small_data()
    data.setup()
    loader = data.train_dataloader()
    orders = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        orders.append([tuple(row) for tokens, _ in loader for row in tokens.tolist()])
    assert data.train_windows is not None
    in_stream_order = sorted(
        tuple(tokens.tolist()) for tokens, _ in (data.train_windows[k] for k in range(len(data.train_windows)))
    )
    assert sorted(orders[0]) == sorted(orders[1]) == in_stream_order
    assert orders[0] != orders[1]


def test_the_order_of_the_windows_follows_the_seed() -> None:
    def order(seed: int) -> list[int]:
        data = small_data(seed=seed)
        data.setup()
        return list(data.train_dataloader().sampler)

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_workers_deliver_the_same_batches_as_the_training_process() -> None:
    batches = []
    for num_workers in (0, 2):
        data = small_data(num_workers=num_workers)
        data.setup()
        batches.append([tokens for tokens, _ in data.train_dataloader()])
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_the_workers_end_with_the_data() -> None:
    data = small_data(num_workers=2)
    data.setup()
    loader = data.train_dataloader()
    next(iter(loader))
    assert len(multiprocessing.active_children()) == 2
    data.on_exception(KeyError())
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_worker_leaves_signals_to_the_training_process(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from slm.data.token_data import SECONDS_TO_STOP, _leave_signals_to_the_parent\n"
        "_leave_signals_to_the_parent(0)\n"
        "for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):\n"
        "    os.kill(os.getpid(), signum)\n"
        "print(0 < signal.alarm(0) <= SECONDS_TO_STOP)\n"
    )
    assert run_command("-c", code, cwd=tmp_path).stdout == "True\n"


def test_evaluation_reads_the_held_out_windows_in_their_order() -> None:
    data = small_data(val_fraction=0.5, batch_size=7)
    data.setup()
    assert data.val_windows is not None
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        tokens = torch.cat([tokens for tokens, _ in loader])
        assert torch.equal(tokens.flatten(), data.val_windows.stream[:-1])


@pytest.mark.parametrize("num_devices", [2, 4])
@pytest.mark.parametrize("is_shuffled", [True, False])
def test_each_batch_of_several_devices_is_the_batch_of_one(num_devices: int, is_shuffled: bool) -> None:
    """The last batch is uneven, and some devices have none of it: these get a window that does not count."""

    def batches(rank: int, num_devices: int) -> list[list[list[int]]]:
        """The windows of each batch that count on a device."""
        data = small_data(num_tokens=2 * 16 * 23 + 1, val_fraction=0.5, batch_size=4)
        data.setup()
        progress = {"world_size": num_devices, "global_rank": rank, "current_epoch": 0}
        data.trainer = SimpleNamespace(**progress)  # type: ignore[assignment]
        loader = data.train_dataloader() if is_shuffled else data.val_dataloader()
        counted = [data.windows_in(number, is_training=is_shuffled)[0] for number in range(len(loader))]
        return [tokens.tolist()[:num] for num, (tokens, _) in zip(counted, loader, strict=True)]

    alone = batches(0, 1)
    shares = [batches(rank, num_devices) for rank in range(num_devices)]
    assert len(alone[-1]) == 3
    assert [len(share[-1]) for share in shares] == ([2, 1] if num_devices == 2 else [1, 1, 1, 0])
    for number, batch in enumerate(alone):
        together = [window for share in shares for window in share[number]]
        assert sorted(together) == sorted(batch)


def test_a_batch_that_the_devices_cannot_share_equally_is_refused() -> None:
    data = small_data(batch_size=4)
    data.setup()
    data.trainer = SimpleNamespace(world_size=3, global_rank=0)  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"batch_size=4 windows cannot be shared .* give --data.batch_size 3 or 6"):
        data.train_dataloader()


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
@pytest.mark.parametrize("batch", [0, 1, 3, 9])
def test_training_goes_on_before_any_batch_on_any_number_of_devices(num_replicas: int, batch: int) -> None:
    def batches(data: DummyData) -> list[list[list[int]]]:
        loader = data.train_dataloader()
        loader.sampler.set_epoch(2)  # type: ignore[attr-defined]
        return [tokens.tolist() for tokens, _ in loader]

    for rank in range(num_replicas):
        whole, rest = small_data(batch_size=4), small_data(batch_size=4)
        for data in (whole, rest):
            data.setup()
            data.trainer = SimpleNamespace(world_size=num_replicas, global_rank=rank)  # type: ignore[assignment]
        rest.start_at(2, whole.windows_before(2, batch))
        assert rest.first_batch == batch
        assert batches(rest) == batches(whole)[batch:]
        assert rest.windows_before(2, batch + 1) == whole.windows_before(2, batch + 1)
        assert rest.windows_before(3, 1) == whole.windows_before(3, 1)


def test_dummy_data_knows_what_can_be_reached() -> None:
    data = DummyData(50, 16)
    assert data.optimum == data.source.optimum(16)
    assert data.unigram == data.source.unigram_entropy
    assert data.best_accuracy == data.source.best_accuracy(16)
    assert data.tokenizer is None
    assert data.token_bytes is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"val_fraction": 0.0}, "val_fraction=0.0 must be above 0"),
        ({"val_fraction": 1.0}, "val_fraction=1.0 must be above 0 and below 1"),
        ({"num_workers": -1}, "num_workers=-1 must be at least 0"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"num_tokens": 0}, "num_tokens=0 must be at least 1"),
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        ({"max_seq_len": 0}, "max_seq_len=0 must be at least 1"),
        ({"seed": 2**63}, "seed=9223372036854775808 must be"),
    ],
)
def test_an_argument_out_of_range_is_refused_with_its_value(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small_data(**changes)


def test_a_stream_too_short_for_two_windows_is_refused_and_one_just_long_enough_is_not() -> None:
    with pytest.raises(InputError, match=r"32 tokens are too few.*max_seq_len=16.*33 tokens"):
        small_data(num_tokens=32).setup()
    data = small_data(num_tokens=33)
    data.setup()
    assert data.train_windows is not None
    assert data.val_windows is not None
    assert (len(data.train_windows), len(data.val_windows)) == (1, 1)


def test_data_without_a_tokenizer_does_not_go_on_from_text() -> None:
    small_data().continue_with(None)
    with pytest.raises(InputError, match=r"was trained with tokenizer=bytes, the data has tokenizer=None"):
        small_data().continue_with("bytes")

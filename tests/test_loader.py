"""The order of the windows: a permutation that is a function of (seed, epoch, position)."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from conftest import small_data

from slm.data.windows import CHUNK, ShuffledOrder, StreamOrder, Windows, shift_of, shuffled


def order(size: int, seed: int = 0, epoch: int = 0) -> list[int]:
    return shuffled(torch.arange(size), size, seed, epoch).tolist()


def windows(number: int) -> Windows:
    return Windows(torch.arange(2 * number + 1), seq_len=2)


@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 1000, 4097])
def test_each_window_comes_once_an_epoch(size: int) -> None:
    for epoch in range(3):
        assert sorted(order(size, epoch=epoch)) == list(range(size))


def test_a_position_alone_gives_what_stands_there_in_the_whole_order() -> None:
    whole = order(1000, seed=3, epoch=5)
    for position in (0, 1, 499, 999):
        assert shuffled(torch.tensor([position]), 1000, 3, 5).tolist() == [whole[position]]


def test_the_order_is_the_same_on_every_machine() -> None:
    assert order(10) == [5, 3, 9, 4, 2, 7, 1, 8, 0, 6]
    assert shuffled(torch.arange(3), 10**10, 7, 2).tolist() == [6498964835, 7644918203, 5316639668]


@pytest.mark.slow
def test_every_order_of_four_windows_is_equally_likely() -> None:
    seen = Counter(tuple(order(4, epoch=epoch)) for epoch in range(480))
    expected = 480 / 24
    chi_square = sum((seen[permutation] - expected) ** 2 / expected for permutation in seen)
    assert len(seen) == 24
    assert chi_square < 50  # 23 degrees of freedom: more than this once in 1,100 seeds


def test_neighbours_in_the_order_are_no_neighbours_in_the_stream() -> None:
    items = torch.tensor(order(10_000)).double()
    assert abs(torch.corrcoef(torch.stack([items[:-1], items[1:]]))[0, 1]) < 0.05
    assert sum(b == a + 1 for a, b in pairwise(order(10_000))) < 10


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_a_corpus_of_ten_to_the_tenth_windows_is_entered_anywhere() -> None:
    positions = torch.randint(10**10, (1000,), generator=torch.Generator().manual_seed(0)).unique()
    items = shuffled(positions, 10**10, 0, 0)
    assert len(items.unique()) == len(positions)
    assert 0 <= int(items.min()) <= int(items.max()) < 10**10
    assert items.double().mean().item() == pytest.approx(5e9, rel=0.1)


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_devices_share_the_order_without_overlap(num_devices: int) -> None:
    shares = [list(ShuffledOrder(windows(20), 0, 4, num_devices, rank)) for rank in range(num_devices)]
    assert {len(share) for share in shares} == {20 // num_devices}
    assert sum(zip(*shares, strict=True), ()) == tuple(order(20))


@pytest.mark.parametrize("start", [0, 1, 4999, 5000])
def test_an_order_begun_anywhere_is_the_rest_of_the_whole_one(start: int) -> None:
    assert CHUNK < 5000
    sampler = ShuffledOrder(windows(5000), 0)
    sampler.start_at(2, start)
    sampler.set_epoch(2)
    assert list(sampler) == order(5000, epoch=2)[start:]
    sampler.set_epoch(3)
    assert list(sampler) == order(5000, epoch=3)
    assert len(sampler) == 5000


def test_the_order_of_the_stream_can_be_entered_too() -> None:
    sampler = StreamOrder(windows(5))
    sampler.start_at(1, 3)
    assert list(sampler) == [3, 4]
    sampler.set_epoch(2)
    assert list(sampler) == [0, 1, 2, 3, 4]


def test_a_shifted_epoch_has_the_same_windows_later_in_the_stream_in_the_same_order() -> None:
    stream = Windows(torch.arange(103), seq_len=10)
    plain, shifted = (ShuffledOrder(stream, seed=4, shifts=shifts) for shifts in (False, True))
    starts = {}
    for epoch in range(40):
        for sampler in (plain, shifted):
            sampler.start_at(epoch, 0)
        expected = [stream[index][0][0].item() for index in plain]
        starts[epoch] = [stream[index][0][0].item() for index in shifted]
        shift = shift_of(10, 4, epoch)
        assert starts[epoch] == [min(start + shift, 103 - 1 - 10) for start in expected]
        assert [stream[index][1].tolist() for index in shifted] == [[*range(s + 1, s + 11)] for s in starts[epoch]]
    assert min(starts[0]) == 0
    assert {min(first) for first in starts.values()} == set(range(10))


def test_shifted_windows_are_the_training_data_s_alone() -> None:
    plain, shifted = small_data(batch_size=10, seed=4), small_data(batch_size=10, seed=4, shift_windows=True)
    for data in (plain, shifted):
        data.setup()
    assert plain.fingerprint != shifted.fingerprint
    for mine, other in zip(shifted.val_dataloader(), plain.val_dataloader(), strict=True):
        assert torch.equal(mine[0], other[0])
    epoch = 1
    shift = shift_of(16, 4, epoch)
    assert shift > 0
    tokens = []
    for data in (plain, shifted):
        data.start_at(epoch, 0)
        loader = data.train_dataloader()
        tokens.append(torch.cat([batch for batch, _ in loader]))
    in_the_stream = tokens[0][:, shift:] == tokens[1][:, :-shift]  # but where the stream ends
    assert in_the_stream.all(dim=1).sum() >= len(in_the_stream) - 1


def test_a_shifted_epoch_can_be_entered_anywhere() -> None:
    stream = Windows(torch.arange(103), seq_len=10)
    sampler = ShuffledOrder(stream, seed=4, shifts=True)
    sampler.start_at(3, 0)
    whole = list(sampler)
    sampler.start_at(3, 6)
    assert list(sampler) == whole[6:]


def test_no_shift_leaves_the_stream() -> None:
    stream = Windows(torch.arange(10), seq_len=9)
    assert [stream[0, shift][1].tolist() for shift in range(9)] == [[*range(1, 10)]] * 9
    with pytest.raises(IndexError):
        stream[1, 0]

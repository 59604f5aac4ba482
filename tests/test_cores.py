"""Threads give way to other programs, and no bit of a result changes."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import small_model

from slm.run import cores
from slm.run.cores import IdleThreads, gives_way, waited

pytestmark = pytest.mark.skipif(waited() is None, reason="the system does not say how long threads wait for a core")


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def num_system_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_idle_threads_make_more_threads_of_openmp_than_there_are_cores_until_they_end(two_threads: None) -> None:
    torch.ones(2**18).exp_()  # the team of this thread
    before = num_system_threads()
    idle = IdleThreads()
    added = num_system_threads() - before
    helpers = sum(name.startswith("idle") for name in names())
    assert 2 + (added - helpers) > len(os.sched_getaffinity(0))
    idle.end()
    assert not any(name.startswith("idle") for name in names())
    for _ in range(200):  # threads of OpenMP end a little after the one that they belong to
        if num_system_threads() == before:
            break
        time.sleep(0.05)
    assert num_system_threads() == before


def test_they_are_there_while_threads_wait_for_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 0.01, 0.5, 0.6, 0.61, 1.5])
    seen: list[str] = []

    class Noted:
        def __init__(self) -> None:
            seen.append("added")

        def end(self) -> None:
            seen.append("ended")

    class Over(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            seen.append(f"{timeout:g} s")
            return len([event for event in seen if event == "1 s"]) > 5

    monkeypatch.setattr(cores, "waited", lambda: next(seconds))
    monkeypatch.setattr(cores, "IdleThreads", Noted)
    cores._watch(Over())
    events = [event for event in seen if event != "1 s"]
    assert events == ["added", "ended", "added", "ended"]
    assert seen.index("added") == 2  # at the second look
    assert seen.index("ended") == 5  # not at the third, which is between the two limits


@pytest.mark.parametrize("settled", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "one thread", "another system"])
def test_nothing_happens_where_it_is_settled_or_not_known(
    settled: str, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    with gives_way():
        assert "gives way" in names()
    assert "gives way" not in names()
    if settled == "one thread":
        torch.set_num_threads(1)
    elif settled == "another system":
        monkeypatch.setattr(cores, "waited", lambda: None)
    else:
        monkeypatch.setenv(settled, "0")
    with gives_way():
        assert "gives way" not in names()


def test_the_time_that_threads_wait_only_grows() -> None:
    first = waited()
    second = waited()
    assert first is not None
    assert second is not None
    assert 0.0 <= first <= second


def test_no_bit_changes_while_threads_give_way(two_threads: None) -> None:
    results = []
    for gives in (False, True):
        model = small_model(vocab_size=300, embed_dim=64, hidden_dim=256)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        tokens = torch.randint(300, (32, 17), generator=torch.Generator().manual_seed(0))
        idle = IdleThreads() if gives else None
        for _ in range(5):
            hidden = model.transformer(tokens[:, :-1])
            model.loss(hidden.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        if idle is not None:
            idle.end()
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))

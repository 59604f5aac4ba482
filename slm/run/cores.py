"""Threads that give way: torch's threads wait for each other at every operation, and other programs want the cores too.

GNU's OpenMP, which torch uses on Linux, lets a thread that waits spin for some milliseconds before it sleeps. That is
fastest on cores of its own; on a core that another program wants, the thread that it waits for does not run meanwhile.
While a process has more threads of OpenMP than there are cores, they spin 3,000 times less (GOMP_SPINCOUNT in libgomp's
manual). So where threads are kept waiting for a core, others are added that do nothing. The threads that compute stay
as many, so no sum and no bit of a result changes.

Tokens/s on two cores alone, beside one and beside two busy processes, by `python -m tests.shared_cores` (medians, and
after the slash where threads do not give way; `small_text` is the recipe):

| model | processor | alone | beside one | beside two |
|---|---|---|---|---|
| small_text | AVX512-bf16 | 40,391 / 42,666 | 24,769 / 10,821 | 14,061 / 9,147 |
| default | AVX512-bf16 | 44,387 / 44,855 | 24,548 / 13,887 | 19,443 / 12,152 |
| small_text | AVX2 | 15,057 / 17,024 | 8,230 / 3,582 | 7,827 / 3,209 |
| default | AVX2 | 10,477 / 9,806 | 6,089 / 4,116 | 4,839 / 1,804 |

That `small_text` alone was slower with them is noise: none was added, and 13 more turns gave 16,757 / 15,647.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

INTERVAL = 1.0
"""Seconds between two looks."""
MOST_WAITING, LEAST_WAITING = 0.1, 0.025
"""Share of their time that threads wait for a core: from which on they give way, and until when."""
MOST_HELPERS = 32
ELEMENTS_OF_A_THREAD = 2**16
"""torch gives a thread at least half as many elements of a tensor to work on."""


@contextlib.contextmanager
def gives_way() -> Iterator[None]:
    """While the body runs, let the threads of this process give way where other programs want their cores.

    Nothing happens where that cannot be known (other systems than Linux), where the user has said how threads wait, or
    where it would take more than 32 helpers: few threads on many cores.
    """
    is_settled = torch.get_num_threads() == 1 or {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    if is_settled or waited() is None or num_helpers() > MOST_HELPERS:
        yield
        return
    is_over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(is_over,), name="gives way", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def waited() -> float | None:
    """Seconds that the threads of this process were ready to run and had no core; None where Linux does not say."""
    total = 0
    try:
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                total += int((task / "schedstat").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return total / 1e9


def _watch(is_over: threading.Event) -> None:
    before, added = waited(), None
    while not is_over.wait(INTERVAL):
        now = waited()
        share = 0.0 if now is None or before is None else (now - before) / INTERVAL / torch.get_num_threads()
        before = now
        if added is None and share > MOST_WAITING:
            added = IdleThreads()
        elif added is not None and share < LEAST_WAITING:
            added.end()
            added = None
    if added is not None:
        added.end()


def num_helpers() -> int:
    """How many teams of OpenMP, of as many threads as torch uses, it takes to have more threads than cores."""
    team, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    return -(-(cores + 1 - team) // (team - 1))


class IdleThreads:
    """Threads of OpenMP that do nothing, so many that there are more of these than cores."""

    def __init__(self) -> None:
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []
        team = torch.get_num_threads()
        for number in range(num_helpers()):
            is_there = threading.Event()
            thread = threading.Thread(target=self._idle, args=(is_there, team), name=f"idle {number}", daemon=True)
            with contextlib.suppress(RuntimeError):  # the system allows no more threads
                thread.start()
                is_there.wait()
                self._threads.append(thread)

    def _idle(self, is_there: threading.Event, team: int) -> None:
        try:
            torch.empty(team * ELEMENTS_OF_A_THREAD).fill_(0.0)  # OpenMP keeps a team for each thread that needed one
        finally:
            is_there.set()
        self._is_over.wait()

    def end(self) -> None:
        """Let them go."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()

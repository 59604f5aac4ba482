"""How the processes of a run agree to save or to stop, without a word between them at any step.

A signal may reach one process alone, while its main thread waits for the others inside a library that no signal
interrupts. So a thread of each process hears signals, and tells rank 0 over a connection of its own. Rank 0 asks every
rank for its place, and picks the next one that nobody has reached: there all of them do what was ordered. Training
waits only while that is being agreed.

A place is a boundary where a run may be saved: before an optimizer step, and before each batch of a validation. All
processes pass the same places in the same order.
"""

import contextlib
import os
import secrets
import signal
import socket
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

from slm.run.processes import Processes

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
"""Ctrl-C, a scheduler, a terminal that was closed, and SLURM before a job's time is over."""
SAVE = 0
"""An order to save; any other is the number of a signal, to save and stop."""
LOST = 75
"""The exit status of a process that goes because another one is gone; EX_TEMPFAIL."""
SECONDS_TO_REST = 0.02
SECONDS_OF_GRACE = 3.0
"""How long the main thread may take to leave once there is nothing more to save."""


def _let_threads_rest() -> None:
    """Before a fork, let threads of gloo leave Python, which they enter for a moment after each collective.

    Up to 3.11, CPython's child process waits for ever if one of them held a lock of the interpreter at that instant.
    """
    time.sleep(SECONDS_TO_REST)


class Control:
    """What one process knows of the orders to its run.

    Attributes:
        is_training: whether orders wait for a place; else a signal ends the processes at once.
        leaves_for: the signal that ends them at once.
        stops_for: the signal for which the main thread is leaving.
        has_failed: whether the others should take this process for lost.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.is_training = False
        self.leaves_for: int | None = None
        self._place = -1
        self._due: dict[int, int] = {}
        self._is_agreeing = False
        self._changed = threading.Condition()
        self._lost = threading.Event()
        self.stops_for: int | None = None
        self.has_failed = False
        self._is_leaving = False
        self._peers: dict[int, Connection] = {}
        self._told: dict[int, int | None] = {}  # by rank 0: the place of each
        self._timer: threading.Timer | None = None
        self._orders: list[int] = []
        self._parent = processes.parent

    # ---- for the main thread

    def reach(self) -> int | None:
        """Pass the next place; returns the order that is due there."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_agreeing)
            self._place += 1
            return self._due.pop(self._place, None)

    def end_training(self) -> int | None:
        """Pass the last place; returns the signal that was heard before, if there was one."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_agreeing)
            self.is_training = False
            return next(filter(None, self._due.values()), None)

    def postpone(self, order: int | None) -> None:
        """Let an order that was due be due at the next place; all processes must."""
        if order is not None:
            with self._changed:
                self._due[self._place + 1] = self._due.get(self._place + 1, SAVE) or order

    def order(self, order: int) -> None:
        """Let all processes save, or stop for a signal, at a place that none has passed yet."""
        if self.processes.world_size > 1:
            self._own_end.send(bytes([order]))
        else:
            self.postpone(order)

    def has_lost_another(self, seconds: float) -> bool:
        """Whether another process has gone without a word, or does so in this time."""
        is_possible = self.processes.world_size > 1 and self.leaves_for is None
        return is_possible and self._lost.wait(seconds)

    # ---- the thread

    def connect(self) -> None:
        """Connect all processes through rank 0, and hear signals from here on; `processes` have met."""
        if self.processes.world_size == 1:
            return
        self._inbox, self._own_end = socket.socketpair()
        self._own_end.setblocking(False)
        signal.set_wakeup_fd(self._own_end.fileno(), warn_on_full_buffer=False)
        if self.processes.rank == 0:
            key = secrets.token_hex()
            with Listener(("", 0), backlog=self.processes.world_size, authkey=key.encode()) as listener:
                self.processes.from_rank_zero([listener.address[1], key])
                while len(self._peers) < self.processes.world_size - 1:
                    with contextlib.suppress(AuthenticationError, EOFError, OSError):  # a stranger at the port
                        peer: Any = listener.accept()
                        self._peers[peer.recv()] = peer
        else:
            port, key = self.processes.from_rank_zero(None)
            peer = Client((os.environ.get("MASTER_ADDR", "127.0.0.1"), port), authkey=key.encode())
            peer.send(self.processes.rank)
            self._peers[0] = peer
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=_let_threads_rest, after_in_child=self._forget)
        threading.Thread(target=self._serve, name="control", daemon=True).start()

    def close(self) -> None:
        """Tell the others that this process leaves, and why."""
        if self.processes.world_size > 1:
            signal.set_wakeup_fd(-1)
            self._is_leaving = True
            if self._timer is not None:
                self._timer.cancel()
            self._tell("lost") if self.has_failed else self._tell("bye", self.stops_for)

    def _forget(self) -> None:
        """A worker that kept the connections would keep the others from noticing that this process has died."""
        signal.set_wakeup_fd(-1)
        ends: list[Any] = [*self._peers.values(), self._inbox, self._own_end]
        for end in ends:
            end.close()

    def _serve(self) -> None:
        while True:
            ready = wait([self._inbox, *self._peers.values()], timeout=1.0)
            if os.getppid() != self._parent:  # the launcher was killed
                self._parent = os.getppid()
                self._hear(signal.SIGTERM)
            if self._inbox in ready:
                for order in self._inbox.recv(64):
                    if order == SAVE or order in SIGNALS:  # a worker that ends is told in the same way
                        self._hear(order)
            for rank, peer in list(self._peers.items()):
                if peer in ready:
                    try:
                        self._answer(rank, *peer.recv())
                    except (EOFError, OSError):
                        self._peers.pop(rank, None)
                        self._lose()

    def _hear(self, order: int) -> None:
        """An order was given to this process: pass it to rank 0, which has it agreed or, outside training, done."""
        if self._is_leaving:
            return
        if self.processes.rank > 0:
            self._tell("order", order)
        elif order != SAVE or self.is_training:
            self._orders.append(order)
            self._ask()

    def _ask(self) -> None:
        """Rank 0 asks every rank for its place, unless it still waits for an answer."""
        if self._orders and not self._told:
            self._told[0] = self._wait_at_next_place()
            self._tell("where")

    def _answer(self, rank: int, message: str, *values: Any) -> None:
        if message == "order":
            self._hear(*values)
        elif message == "where":
            self._tell("at", self._wait_at_next_place())
        elif message == "at":
            self._told[rank] = values[0]
            self._decide()
        elif message == "due":
            self._note(*values)
        elif message == "leave":
            self._leave(*values)
        elif message == "lost":
            self._lose()
        elif message == "bye":
            del self._peers[rank]
            [signum] = values
            is_stopping = self.stops_for is not None or any(self._due.values())
            if signum is not None and not is_stopping:  # it has left before it was told a place
                self._leave(signum)
            elif self.is_training and not is_stopping:
                self._lose()

    def _decide(self) -> None:
        """Rank 0 picks the first place that nobody has reached; where one of them does not train, all leave at once."""
        if self._told.keys() >= {0, *self._peers}:
            order, places = self._orders.pop(0), [place for place in self._told.values() if place is not None]
            all_train = len(places) == len(self._told)
            self._told.clear()
            if all_train:
                due = max(places) + 1, order
            elif order == SAVE:
                due = -1, SAVE
            else:
                self._leave(order)
                return
            self._tell("due", *due)
            self._note(*due)
            self._ask()

    def _wait_at_next_place(self) -> int | None:
        """Keep the main thread from passing a place; returns the last one that it passed, None outside training."""
        with self._changed:
            self._is_agreeing = True
            return self._place if self.is_training else None

    def _note(self, place: int, order: int) -> None:
        with self._changed:
            self._due[place] = self._due.get(place, SAVE) or order
            self._is_agreeing = False
            self._changed.notify_all()

    def _tell(self, *message: Any) -> None:
        for peer in list(self._peers.values()):
            with contextlib.suppress(OSError):  # it has gone, which is noticed where it is heard
                peer.send(message)

    def _leave(self, signum: int) -> None:
        """End this process as the signal does, even where the main thread waits for others in vain."""
        if not self._is_leaving:
            self._is_leaving, self.is_training, self.leaves_for = True, False, signum
            with self._changed:
                self._is_agreeing = False
                self._changed.notify_all()
            if self.processes.rank == 0:
                self._tell("leave", signum)
            os.kill(os.getpid(), signum)
            self._exit_later(128 + signum)

    def _lose(self) -> None:
        if not (self._is_leaving or self._lost.is_set()):
            self._lost.set()
            self._tell("lost")
            self._exit_later(LOST)

    def _exit_later(self, status: int) -> None:
        self._timer = threading.Timer(SECONDS_OF_GRACE, os._exit, [status])
        self._timer.daemon = True
        self._timer.start()

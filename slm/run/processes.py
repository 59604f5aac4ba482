"""The processes of a run: which of them this one is, how they meet, and what they tell each other.

A launcher starts them: torchrun, srun, or `slm.command.launcher` where a command asks for several devices.
"""

import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only

from slm.errors import InputError, check
from slm.messages import say_here

SECONDS_OF_SILENCE = 30.0
"""How long one process waits for others without a word."""
SECONDS_OF_PATIENCE = 1800.0
"""How long it waits for them to start."""
SHORTEST_LOOK, LONGEST_LOOK = 0.01, 0.5
"""Seconds between two looks: less at first."""
LAUNCHER = "SLM_LAUNCHER"
"""In the environment: the process that started this one, which may be gone before it can be asked for."""
FAILED = "failed"
"""A key in the store that `slm.command.launcher` sets when a process has failed; torchrun ends the others itself."""
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""Set by a launcher that serves the store itself; else rank 0 does."""


@dataclass
class Processes:
    """The processes of a run, as this one sees them.

    Attributes:
        rank: the number of this process, from 0.
        world_size: how many there are.
        local_rank: the number of this process on its node.
        local_world_size: how many there are on its node.
        node_rank: the number of its node.
        launcher: what started them; empty for a process alone.
        parent: the process that started this one.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    launcher: str = ""
    parent: int = field(default_factory=os.getppid)
    store: Any = None
    _num_agreed: int = field(default=0, repr=False)

    @property
    def num_nodes(self) -> int:
        return self.world_size // self.local_world_size

    def meet(self) -> None:
        """Wait until all processes are there; after half a minute say which are missing.

        Raises:
            InputError: some are not, after half an hour.
        """
        if self.world_size == 1:
            return
        host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
        serves = self.rank == 0 and os.environ.get(AGENT_STORE) != "True"
        wait = _Wait(lambda: f"rank 0 at {host}:{port}", speaks=self.local_rank == 0, parent=self.parent)
        while self.store is None:
            try:
                if not serves:
                    socket.create_connection((host, port), timeout=1).close()  # TCPStore prints what it tries
                timeout = timedelta(seconds=5)
                store = dist.TCPStore(host, port, None, serves, timeout=timeout, wait_for_workers=False)
                self.store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            except (RuntimeError, OSError) as error:  # nobody is there yet
                if serves:
                    raise InputError(f"MASTER_PORT={port} cannot be served ({error}): give a free one") from error
                wait.look()
        self.store.set_timeout(timedelta(seconds=SECONDS_OF_PATIENCE))
        self.store.set(f"here {self.rank}", "1")
        how = "with srun" if self.launcher == "srun" else "by the same command on its node"
        keys = {rank: f"here {rank}" for rank in range(self.world_size)}
        self._wait_for(keys, f": each is started {how}", speaks=self.rank == 0)

    def _wait_for(self, keys: dict[int, str], why: str, speaks: bool, patience: float | None = None) -> None:
        """Wait until the keys, each set by the process of a rank, are in the store; a signal is heard meanwhile.

        Args:
            keys: by the rank that sets them.
            why: what the sentence about the missing ranks ends with.
            speaks: whether this process says it, when the wait is long.
            patience: in seconds.
        """

        def missing() -> str:
            ranks = [str(rank) for rank, key in keys.items() if not self.store.check([key])]
            return f"{len(ranks)} of {self.world_size} processes, rank {', '.join(ranks)}{why}"

        wait = _Wait(missing, speaks, self.parent, patience)
        while not self.store.check(list(keys.values())):
            if self.store.check([FAILED]):
                raise dist.DistError("another process has failed")
            wait.look()

    def from_all(self, value: Any) -> list[Any]:
        """The value, as JSON, that each process gives, by rank; all must call this in the same order."""
        if self.world_size == 1:
            return [value]
        self._num_agreed += 1
        keys = {rank: f"{self._num_agreed} {rank}" for rank in range(self.world_size)}
        self.store.set(keys[self.rank], json.dumps(value))
        self._wait_for(keys, " to come as far", speaks=self.rank == 0)
        return [json.loads(self.store.get(key)) for key in keys.values()]

    def from_rank_zero(self, value: Any) -> Any:
        """The value, as JSON, that rank 0 gives."""
        if self.world_size == 1:
            return value
        self._num_agreed += 1
        key = f"{self._num_agreed} 0"
        if self.rank == 0:
            self.store.set(key, json.dumps(value))
        self._wait_for({0: key}, " to come as far", speaks=self.rank == 1)
        return json.loads(self.store.get(key))

    @contextmanager
    def first_on_each_node(self, why: str) -> Iterator[None]:
        """Let the first process of each node do the body before the others of that node do; they say why they wait."""
        if self.world_size == 1:
            yield
            return
        self._num_agreed += 1
        key = f"{self._num_agreed} of node {self.node_rank}"
        if self.local_rank > 0:
            self._wait_for({self.rank - self.local_rank: key}, why, speaks=self.local_rank == 1, patience=math.inf)
        yield
        if self.local_rank == 0:
            self.store.set(key, "1")

    def open_group(self, device: str) -> None:
        """Make the process group, which Lightning finds: a timeout or backend that its strategy is given has no effect.

        With GPUs there is a group of the CPUs too. GLOO_SOCKET_IFNAME names its network where the host's name is none.
        """
        if self.world_size > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            store = dist.PrefixStore("group", self.store)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size)


class _Wait:
    """A wait that ends, and that says what it is for when it lasts."""

    def __init__(self, reason: Callable[[], str], speaks: bool, parent: int, patience: float | None = None) -> None:
        self.reason, self.speaks, self.patience = reason, speaks, patience or SECONDS_OF_PATIENCE
        self.parent = parent
        self._start = time.monotonic()

    def look(self) -> None:
        """Sleep until it is worth looking again.

        Raises:
            InputError: that was too often.
            DistError: the launcher has gone.
        """
        waited = time.monotonic() - self._start
        if waited > self.patience:
            raise InputError(f"given up after waiting {waited:.0f} seconds for {self.reason()}")
        if waited > SECONDS_OF_SILENCE and self.speaks:
            self.speaks = False
            say_here(f"waiting for {self.reason()}")
        if os.getppid() != self.parent:
            raise dist.DistError("the launcher was killed")
        time.sleep(min(SHORTEST_LOOK + waited / 10, LONGEST_LOOK))


def launched_processes() -> Processes:
    """This process among those that a launcher started, as its environment says; one alone where there is none.

    From here on only rank 0 speaks, and Lightning finds what srun says under the names that torchrun uses.
    """
    env = os.environ
    if SLURMEnvironment.detect() and "RANK" not in env and int(env["SLURM_NTASKS"]) > 1:
        slurm = SLURMEnvironment(auto_requeue=False)
        nodes = int(env.get("SLURM_NNODES", env.get("SLURM_JOB_NUM_NODES", "1")))
        env["MASTER_ADDR"], env["MASTER_PORT"] = slurm.main_address, str(slurm.main_port)
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
        env["LOCAL_RANK"], env["GROUP_RANK"] = env["SLURM_LOCALID"], env.get("SLURM_NODEID", "0")
        num_tasks = int(env["SLURM_NTASKS"])
        check(num_tasks % nodes == 0, f"SLURM_NTASKS={num_tasks} is not the same number on each of {nodes} nodes")
        env["LOCAL_WORLD_SIZE"] = str(num_tasks // nodes)
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= env.keys():
        rank_zero_only.rank = int(env.get("NODE_RANK", "0"))  # type: ignore[attr-defined]
        return Processes()
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "srun" if "SLURM_NTASKS" in env else "the launcher"
    rank, world_size, local_rank = (int(env[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    rank_zero_only.rank = rank  # type: ignore[attr-defined]
    local_world_size = int(env.get("LOCAL_WORLD_SIZE", world_size))
    node_rank = int(env.get("GROUP_RANK", rank // local_world_size))
    parent = int(env.get(LAUNCHER, os.getppid()))
    return Processes(rank, world_size, local_rank, local_world_size, node_rank, launcher, parent)

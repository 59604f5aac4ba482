"""Starts a process for each device of this node, passes signals on to them, and ends what a failed one leaves behind.

Lightning can start them too. But it looks at them every five seconds, kills rank 0 where another has stopped as it
should, and leaves one behind that a signal has missed. Here all processes are children of one that does nothing else.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator

from slm.errors import InputError, check
from slm.hardware import accelerator_kind
from slm.messages import say_here
from slm.run.control import LOST, SECONDS_OF_GRACE, SIGNALS
from slm.run.processes import AGENT_STORE, FAILED, LAUNCHER, Processes

SECONDS_BETWEEN_LOOKS = 0.05
SECONDS_TO_LEAVE = SECONDS_OF_GRACE + 2
"""After one process has failed, until the others are killed: they have their own time to leave."""
SECONDS_TO_STOP = 10.0
"""The same where it has stopped for a signal: rank 0 may still ask SLURM for another turn."""
ACCELERATORS: dict[str, Any] = {"cpu": CPUAccelerator, "cuda": CUDAAccelerator, "mps": MPSAccelerator}


def count_devices(trainer: Namespace, processes: Processes) -> tuple[int, int]:
    """How many devices each node has, and how many nodes there are: as the launcher says, else as the settings do.

    Raises:
        InputError: the settings are none, or say something else than the launcher.
    """
    kind = ACCELERATORS.get(accelerator_kind(str(trainer.accelerator)))
    devices: Any = 1 if kind is None else kind.auto_device_count()
    if kind is not None and trainer.devices != "auto":
        try:
            devices = kind.parse_devices(trainer.devices)
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise InputError(f"trainer.devices={trainer.devices}: {error}") from error
    asked = len(devices) if isinstance(devices, list) else int(devices or 1)
    if not processes.launcher:
        return asked, trainer.num_nodes
    started, nodes = processes.local_world_size, processes.num_nodes
    if kind is CUDAAccelerator:
        seen = kind.auto_device_count()
        check(
            seen >= started,
            f"each of the {started} processes of this node sees only {seen} GPUs, and needs to see all of them: with "
            "SLURM, give --gpus-per-node and not --gpus-per-task",
        )
    check(
        trainer.devices == "auto" or asked == started,
        f"trainer.devices={trainer.devices} does not fit the {started} processes that {processes.launcher} started on "
        f"this node: give --trainer.devices auto, or let it start {asked}",
    )
    check(
        trainer.num_nodes in (1, nodes),
        f"trainer.num_nodes={trainer.num_nodes} does not fit the {nodes} nodes of {processes.launcher}: leave it out",
    )
    return started, nodes


def launch(num_devices: int, num_nodes: int, argv: Sequence[str] | None) -> None:
    """Start this command once for each device of this node, and wait until all have ended.

    Args:
        num_devices: of this node.
        num_nodes: that run the same command, each with its own NODE_RANK.
        argv: the arguments; None for those of this process.

    Raises:
        InputError: several nodes are asked for, and the environment does not say how they find each other.
        SystemExit: with the exit status of the first process that failed, if one did.
    """
    node_rank = int(os.environ.get("NODE_RANK", "0"))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
    check(
        num_nodes == 1 or not missing,
        f"trainer.num_nodes={num_nodes} needs {', '.join(missing)} in the environment: the address of the first node, "
        "a free port there, and the number of this node; or use torchrun",
    )
    host = os.environ.get("MASTER_ADDR", "127.0.0.1") if num_nodes > 1 else "127.0.0.1"
    port = int(os.environ["MASTER_PORT"]) if num_nodes > 1 else 0
    store = None
    if node_rank == 0:
        try:
            store = _store(host, port, serves=True)
        except RuntimeError as error:
            raise InputError(f"MASTER_PORT={port} cannot be served ({error}): give a free one") from error
        port = store.port
    shared = {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_devices * num_nodes),
        "LOCAL_WORLD_SIZE": str(num_devices),
        "GROUP_RANK": str(node_rank),
        AGENT_STORE: "True",
        LAUNCHER: str(os.getpid()),
    }
    command = sys.orig_argv if argv is None else [sys.executable, "-m", "slm.cli", *argv]
    children = _Children()
    heard = [signum for signum in SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, children.hear) for signum in heard}
    try:
        for local_rank in range(num_devices):
            own = {"RANK": str(node_rank * num_devices + local_rank), "LOCAL_RANK": str(local_rank)}
            children.start(command, {**os.environ, **shared, **own}, heard)
        status = children.watch(lambda: (store or _store(host, port)).set(f"0/{FAILED}", "1"))
    except BaseException:
        children.kill()
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if status != 0:
        sys.exit(status)


def _store(host: str, port: int, serves: bool = False) -> dist.TCPStore:
    return dist.TCPStore(host, port, None, serves, timeout=timedelta(seconds=5), wait_for_workers=False)


class _Children:
    """The processes of this node."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._signals: list[int] = []

    def hear(self, signum: int, frame: Any) -> None:
        self._signals.append(signum)

    def start(self, command: Sequence[str], env: dict[str, str], heard: list[signal.Signals]) -> None:
        """Start one in a session of its own, so that Ctrl-C reaches it once, from here.

        Signals are kept back from it until it hears them.
        """
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, heard)
        try:
            self._processes.append(subprocess.Popen(command, env=env, start_new_session=True))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def watch(self, tell_others: Callable[[], None]) -> int:
        """Wait for all of them; returns the exit status of the first that failed, 0 if none did.

        Args:
            tell_others: called when one has failed, for those that wait for it to start.
        """
        first: subprocess.Popen[bytes] | None = None
        failed_at = 0.0
        while running := [process for process in self._processes if process.poll() is None]:
            while self._signals:
                self._send(self._signals.pop(0), running)
            if first is None and (first := self._failed()) is not None:
                failed_at = time.monotonic()
                with contextlib.suppress(RuntimeError):  # there may be nobody
                    tell_others()
            is_stopping = first is not None and first.returncode - 128 in SIGNALS
            patience = SECONDS_TO_STOP if is_stopping else SECONDS_TO_LEAVE
            if first is not None and time.monotonic() > failed_at + patience:
                self._send(signal.SIGKILL, running)
            time.sleep(SECONDS_BETWEEN_LOOKS)
        failed = [first or self._failed(), *self._processes]
        first = next((one for one in failed if one and one.returncode not in (0, LOST)), failed[0])
        if first is None:
            return 0
        status = first.returncode
        if status < 0 and -status not in SIGNALS:
            name, rank = signal.Signals(-status).name, self._processes.index(first)
            say_here(f"process {rank} of this node was ended by {name}: a run that had saved goes on with --ckpt_path")
        elif status == LOST:
            say_here("another process of the run has failed or is gone: a run that had saved goes on with --ckpt_path")
        return status if status >= 0 else 128 - status

    def kill(self) -> None:
        self._send(signal.SIGKILL, self._processes)

    def _failed(self) -> subprocess.Popen[bytes] | None:
        return next((process for process in self._processes if process.poll()), None)

    def _send(self, signum: int, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        for process in processes:
            process.send_signal(signum)

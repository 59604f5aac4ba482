"""What a second process costs: time and bytes of a step, beside a bare loop of torch's DistributedDataParallel.

`python -m tests.processes_cost` lets three programs train the default model in turns, each process on one core: this
project on one process, on two, and the bare loop on two, whose steps are those of the second without a Trainer.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from torch.nn.parallel import DistributedDataParallel

from slm import LanguageModel
from slm.data import DummyData
from slm.training.optimizers import build_optimizer

ROOT = Path(__file__).resolve().parent.parent
FIRST = 10
"""The step after which is measured."""
FLAGS = [
    "--trainer.accelerator=cpu", "--trainer.precision=32-true",
    "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false",
]  # fmt: skip


def bytes_sent() -> int:
    """By all processes of this machine to one another, over the loopback device."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


class Measure(Callback):
    """Prints the median time of a step and the bytes sent in one, from rank 0."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.times: list[float] = []
        self.sent: list[int] = []

    def note(self, step: int) -> None:
        self.times.append(time.perf_counter())
        if step in (FIRST, self.last):
            self.sent.append(bytes_sent())
        if step == self.last:
            times = self.times[FIRST - 1 :]
            seconds = statistics.median(b - a for a, b in pairwise(times))
            print(
                f"measured {1000 * seconds:.2f} {(self.sent[1] - self.sent[0]) / (self.last - FIRST):.0f}", flush=True
            )

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            self.note(trainer.global_step)


def bare_loop(last: int) -> None:
    """The steps of the default model in a loop of torch's own, as one of two processes."""
    dist.init_process_group("gloo")
    rank, measure = dist.get_rank(), Measure(last)
    torch.manual_seed(0)
    model, data = LanguageModel(), DummyData(10_000, 128, batch_size=16)
    data.setup()

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = model.transformer

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return model.loss(self.transformer(tokens).flatten(0, 1), targets.flatten())

    module = DistributedDataParallel(Loss())
    optimizer = build_optimizer(model.transformer, model.hparams, fused=True)
    step = 0
    while step < last:
        for tokens, targets in data.train_dataloader():
            optimizer.zero_grad()
            module(tokens, targets).backward()
            torch.nn.utils.clip_grad_norm_(model.transformer.parameters(), 1.0)
            optimizer.step()
            step += 1
            if rank == 0:
                measure.note(step)
            if step == last:
                break
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # while the module is deleted, a thread of gloo may wait for ever for Python's lock (torch 2.13)


def measured(*argv: str) -> tuple[float, int]:
    """Milliseconds and bytes of a step of a program."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, *argv], cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False
        )
    found = re.search(r"^measured ([\d.]+) (\d+)$", done.stdout, re.M)
    assert found, done.stdout + done.stderr
    return float(found[1]), int(found[2])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.processes_cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each program has its turn")
    parser.add_argument("--steps", type=int, default=40, help="of each program, the first ten not measured")
    arguments = parser.parse_args()
    steps, measure = arguments.steps, {"class_path": "processes_cost.Measure", "init_args": {"last": arguments.steps}}
    config = json.dumps({"trainer": {"callbacks": [measure]}})
    train = [str(ROOT / "train.py"), *FLAGS, f"--trainer.max_steps={steps}", "--config", config]
    two = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_port=29555",
        "-m",
        "processes_cost",
        "--bare",
        f"{steps}",
    ]
    programs = {"slm, one process": train, "slm, two": [*train, "--trainer.devices=2"], "bare loop, two": two}
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in programs}
    for _ in range(arguments.rounds):
        for name, argv in programs.items():
            found[name].append(measured(*argv))
    num_parameters = sum(p.numel() for p in LanguageModel().parameters())
    print(f"The gradients of two processes are {2 * 4 * num_parameters / 1e6:.2f} MB, each sent once.\n")
    print("| program | ms/step (lowest to highest) | MB sent in a step |\n|---|---|---|")
    for name, results in found.items():
        times, sent = [ms for ms, _ in results], statistics.median(number for _, number in results)
        spread = f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
        print(f"| {name} | {spread} | {sent / 1e6:.2f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare"]:
        bare_loop(int(sys.argv[2]))
    else:
        main()

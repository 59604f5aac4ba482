"""Stop real runs at random instants, resume them, and compare what they end with to a run that was never stopped.

`python -m tests.stress` prints a line for each stop and a table. Its exit status is 1 where a run was lost or ended
with other bits, or where the runs that resume without `slm.run.resume` did not.
After 23 minutes on two CPU cores it ended with `SIGKILLs in all 108, after the first checkpoint 82, inside a save 23,
in chains 55`, and this table:

| scenario | tried | survived | bitwise equal | steps lost, median and most |
|---|---|---|---|---|
| SIGINT | 22 | 22 | 22 | 0, 0 |
| SIGKILL | 22 | 22 | 22 | 3, 47 |
| SIGKILL inside a save of 30 MB | 22 | 22 | 22 | 6, 10 |
| SIGTERM | 22 | 22 | 22 | 0, 0 |
| chains of 2 to 6 stops, accumulation | 6 | 6 | 6 | 1, 3 |
| chains of 2 to 6 stops, epochs | 6 | 6 | 6 | 1, 48 |
| chains of 2 to 6 stops, sgd, 32 bits | 5 | 5 | 5 | 2, 5 |
| chains of 2 to 6 stops, validations | 6 | 6 | 6 | 1, 6 |
| code in the file | 1 | 1 | 1 |  |
| cut short or empty | 10 | 10 | 10 |  |
| full disk | 1 | 1 | 1 |  |
| gradient not finite | 1 | 1 | 1 |  |
| loss not finite | 1 | 1 | 1 |  |
| one bit flipped | 60 | 60 | 60 |  |
| read-only folder | 1 | 1 | 1 |  |
| stopped in a validation | 23 | 23 | 23 | 0, 6 |
| temporary files on another device | 1 | 1 | 1 | 6, 6 |
| without slm.run.resume (must differ) | 1 | 1 | 0 | 0, 0 |
"""

import argparse
import json
import logging
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slm.command.exit_codes import ends_in_one_line
from slm.errors import InputError
from slm.run.checkpoint import read_checkpoint
from slm.run.resume import ExactResume

ROOT = Path(__file__).resolve().parent.parent
RUN = Path("runs/version_0")
LAST = RUN / "checkpoints/last.ckpt"
RESUME = ["--ckpt_path", "last"]
TIMINGS = "train/tokens_per_second"
EXIT_STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
INEXACT = "without slm.run.resume (must differ)"
PATIENCE = 120
"""Seconds after which a process is taken to hang."""

SMALL = [
    "--model.vocab_size=50", "--model.embed_dim=32", "--model.num_heads=2", "--model.max_seq_len=64",
    "--model.hidden_dim=64", "--model.dropout=0.1", "--model.plateau_patience=0", "--data.batch_size=8",
    "--data.num_tokens=27000", "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false", "--trainer.val_check_interval=6", "--model.learning_rate=0.02",
]  # fmt: skip
"""48 steps an epoch, validations within it, and a learning rate that falls when one of them stalls."""
SETTINGS = {
    "epochs": [*SMALL, "--trainer.val_check_interval=1.0", "--data.num_workers=1"],
    "validations": [*SMALL, "--data.num_workers=0"],
    # 45 batches an epoch: its last step is of one
    "accumulation": [
        *SMALL, "--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=6", "--data.num_tokens=25600",
        "--data.num_workers=2",
    ],
    "sgd, 32 bits": [*SMALL, "--model.optimizer=sgd", "--trainer.precision=32-true", "--trainer.max_steps=90"],
    "30 MB": [*SMALL, "--model.vocab_size=10000", "--model.embed_dim=240", "--data.num_tokens=9000"],
}  # fmt: skip

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every point that is purged
if os.environ.get("STRESS_INEXACT"):
    ExactResume.on_load_checkpoint = Callback.on_load_checkpoint  # type: ignore[method-assign]
if os.environ.get("STRESS_SLOW_SAVES"):
    fsync = os.fsync

    def slow_fsync(descriptor: int) -> None:
        time.sleep(0.2)
        fsync(descriptor)

    os.fsync = slow_fsync


class Trace(Callback):
    """Writes each step and each batch of a validation to `trace`, slowly enough to be hit, and poisons a step if told.

    Args:
        seconds: how much longer each batch takes.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.poison, _, step = os.environ.get("STRESS_POISON", "").partition(" ")
        self.poisoned_step = int(step or -1)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.file = os.open("trace", os.O_WRONLY | os.O_APPEND)
        healthy: Any = pl_module.loss

        def poisoned(*args: Any) -> Any:
            return healthy(*args) + (torch.nan if trainer.global_step == self.poisoned_step else 0)

        if self.poison == "loss":
            pl_module.loss = poisoned  # type: ignore[assignment]

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.poison == "gradient" and trainer.global_step == self.poisoned_step:
            gradient = next(p.grad for p in pl_module.parameters() if p.grad is not None)
            gradient.view(-1)[0] = torch.inf

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._write(str(trainer.global_step))

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.state.fn != "fit":
            self._write("closing")
        elif not trainer.sanity_checking:
            self._write("validation")

    def _write(self, line: str) -> None:
        os.write(self.file, f"{line}\n".encode())
        time.sleep(self.seconds)


# ---- processes


@contextmanager
def default_signals(*signums: signal.Signals) -> Iterator[None]:
    """Let these signals end this process and its children; a job in the background, or under nohup, ignores some."""
    own = {signal.SIGINT: signal.default_int_handler}
    before = {signum: signal.signal(signum, own.get(signum, signal.SIG_DFL)) for signum in signums}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def start(folder: Path, *argv: str, limit: Callable[[], None] | None = None, **env: str) -> subprocess.Popen[str]:
    """The real command, in a session of its own: a terminal, or a scheduler, signals its workers too.

    Args:
        folder: where it runs.
        argv: its arguments.
        limit: what the process does before it becomes the command.
        env: of its environment.
    """
    (folder / "trace").write_text("")
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *argv],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests"), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=limit,
    )


def first_command(settings: list[str], seconds: float = 0.02) -> list[str]:
    callback = {"class_path": "stress.Trace", "init_args": {"seconds": seconds}}
    return [*settings, "--config", json.dumps({"trainer": {"callbacks": [callback]}})]


def next_command(folder: Path, settings: list[str]) -> list[str]:
    return RESUME if (folder / RUN / "config.yaml").exists() else first_command(settings)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit status and all that was said."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return 124, "it hangs"
    return process.returncode, out + err


@dataclass
class Stop:
    """A signal that is sent some seconds after a condition on the run's folder first holds."""

    name: str
    signum: signal.Signals
    condition: Callable[[Path], bool]
    delay: float = 0.0


def interrupt(process: subprocess.Popen[str], folder: Path, stop: Stop) -> tuple[bool, int, str]:
    """Send the signal when its time has come: whether it came, the exit status, and all that was said."""
    while process.poll() is None and not stop.condition(folder):
        time.sleep(0.0005)
    time.sleep(stop.delay)
    is_running = process.poll() is None
    if is_running and stop.signum == signal.SIGKILL:
        process.kill()
    elif is_running:
        os.killpg(process.pid, stop.signum)
    return is_running, *finish(process)


def trace(folder: Path) -> list[str]:
    return (folder / "trace").read_text().split()


def step_of(folder: Path) -> int:
    return max([int(line) for line in trace(folder) if line.isdigit()], default=0)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in (folder / RUN).rglob("*.unfinished")]


def stop_at(rng: random.Random, kind: signal.Signals, step: int) -> Stop:
    return Stop(kind.name, kind, lambda folder: step_of(folder) >= step, rng.uniform(0, 0.06))


def chain(rng: random.Random, last_step: int) -> list[Stop]:
    """Two to six stops at increasing random steps, some of them at the boundary of the two epochs or beside it."""
    half = last_step // 2
    steps = [rng.choice([half - 1, half, half + 1, rng.randrange(2, last_step)]) for _ in range(rng.randrange(2, 7))]
    kinds = rng.choices(list(EXIT_STATUS), weights=[4, 1, 1], k=len(steps))
    return [stop_at(rng, kind, step) for kind, step in zip(kinds, sorted(steps), strict=True)]


def in_a_validation(rng: random.Random) -> Stop:
    """At a random batch of a random validation."""
    kind, batch = rng.choice(list(EXIT_STATUS)), rng.randrange(1, 60)
    return Stop(f"{kind.name} in a validation", kind, lambda folder: trace(folder).count("validation") >= batch)


def in_a_save(rng: random.Random) -> Stop:
    """SIGKILL when the temporary file of a checkpoint has appeared for a random number of times."""
    number, seen = rng.randrange(1, 8), [False]

    def condition(folder: Path) -> bool:
        kept = folder / LAST.parent
        is_there = kept.is_dir() and any(name.endswith(".unfinished") for name in os.listdir(kept))
        if is_there != seen[-1]:
            seen.append(is_there)
        return seen.count(True) >= number

    return Stop("SIGKILL in a save", signal.SIGKILL, condition, rng.uniform(0, 0.02))


# ---- what a run ends with


def ending(folder: Path) -> tuple[dict[str, Any], dict[str, list[tuple[int, float]]]]:
    """The state in `last.ckpt` with the best weights, and every curve as TensorBoard reads it."""
    last, best = (read_checkpoint(folder / LAST.parent / f"{name}.ckpt") for name in ("last", "best"))
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "position", "random_states")
    events = EventAccumulator(str(folder / RUN), size_guidance={"scalars": 0}).Reload()
    curves = {tag: [(p.step, p.value) for p in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    curves[TIMINGS] = [(step, 0.0) for step, _ in curves[TIMINGS]]
    return {**{name: last[name] for name in kept}, "best": best["state_dict"]}, curves


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Where two nests of dictionaries, sequences, tensors and plain values differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from differences(a[key], b[key], f"{path} {key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{path} {index}")
    elif not (torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b):
        yield path


def compare(folder: Path, reference: Path) -> list[str]:
    """Where two runs differ; empty if they ended with the same bits and the same curves."""
    (state, curves), (expected_state, expected_curves) = ending(folder), ending(reference)
    found = [*differences(expected_state, state), *differences(expected_curves, curves, "curve")]
    for tag, points in curves.items():
        if any(b <= a for (a, _), (b, _) in pairwise(points)):
            found.append(f"curve {tag}: steps do not increase")
    return found


# ---- trouble of other kinds

Trouble = Callable[[Path], AbstractContextManager[dict[str, Any] | None]]
"""Around a command that fails in a folder; gives arguments for `start`, or None where it cannot be made."""


@contextmanager
def full_disk(folder: Path) -> Iterator[dict[str, Any]]:
    """No file may grow beyond half the size of a checkpoint."""
    size = (folder / LAST).stat().st_size // 2
    yield {"limit": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}


@contextmanager
def read_only(folder: Path) -> Iterator[dict[str, Any] | None]:
    """A folder without permission to write or, since that does not hold root back, a read-only mount."""
    runs, kept = folder / "runs", folder / LAST.parent
    if os.geteuid() == 0:
        if subprocess.run(["mount", "--bind", runs, runs], check=False, capture_output=True).returncode != 0:
            yield None
            return
        subprocess.run(["mount", "-o", "remount,bind,ro", runs], check=True)
        yield {}
        subprocess.run(["umount", runs], check=True)
    else:
        kept.chmod(0o555)
        yield {}
        kept.chmod(0o755)


class Malicious:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


def is_refused(path: Path) -> bool:
    try:
        read_checkpoint(path)
    except InputError as error:
        return str(path) in str(error)
    return False


# ---- trials


@dataclass
class Outcome:
    """What became of the trials of one scenario."""

    tried: int = 0
    survived: int = 0
    equal: int = 0
    lost: list[int] = field(default_factory=list)


class Stress:
    """Runs trials and keeps count.

    Args:
        root: a folder for the runs.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.outcomes: dict[str, Outcome] = defaultdict(Outcome)
        self.kills = dict.fromkeys(("in all", "after the first checkpoint", "inside a save", "in chains"), 0)
        self.lock = threading.Lock()
        self.reference_lock = threading.Lock()

    def folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.root))

    def reference(self, name: str) -> Path:
        """A run of these settings that is never stopped."""
        folder = self.root / f"uninterrupted, {name}"
        with self.reference_lock:
            if not folder.exists():
                folder.mkdir()
                status, said = finish(start(folder, *first_command(SETTINGS[name], seconds=0)))
                assert status == 0, said
        return folder

    def stopped(self, scenario: str, name: str, stops: list[Stop], env: dict[str, str]) -> None:
        """One run with its stops, to its end."""
        folder = self.folder()
        problems: list[str] = []
        lost: list[int] = []
        for stop in stops:
            process = start(folder, *next_command(folder, SETTINGS[name]), **env)
            was_sent, status, said = interrupt(process, folder, stop)
            expected = EXIT_STATUS[stop.signum] if was_sent else 0
            if was_sent:
                lost.append(self.count(scenario, stop, folder, is_chain=len(stops) > 1))
            if status not in (expected, 0):  # 0: it was at its end
                problems.append(f"{stop.name}: exit status {status}: {said[-300:]}")
            if expected > 0 and status == expected and lost[-1] > 0:
                problems.append(f"{stop.name} lost {lost[-1]} steps")
        self.complete(scenario, name, folder, problems, lost, env)

    def count(self, scenario: str, stop: Stop, folder: Path, is_chain: bool) -> int:
        """Take note of a stop; returns the steps that it lost."""
        has_checkpoint, reached = (folder / LAST).exists(), step_of(folder)
        found = read_checkpoint(folder / LAST)["global_step"] if has_checkpoint else 0
        with self.lock:
            if stop.signum == signal.SIGKILL:
                self.kills["in all"] += 1
                self.kills["after the first checkpoint"] += has_checkpoint
                self.kills["inside a save"] += bool(leftovers(folder))
                self.kills["in chains"] += is_chain
            print(f"{scenario}: {stop.name} at step {reached}, goes on at {found}", flush=True)
        return max(0, reached - found)

    def unwritable(self, scenario: str, name: str, trouble: Trouble) -> None:
        """A run that cannot write for a while: an error, the old checkpoint untouched, and it goes on afterwards."""
        folder = self.folder()
        stop = stop_at(random.Random(0), signal.SIGTERM, 20)
        interrupt(start(folder, *first_command(SETTINGS[name])), folder, stop)
        before = (folder / LAST).read_bytes()
        with trouble(folder) as arguments:
            if arguments is None:
                print(f"{scenario}: not tried, since root needs to mount for it and may not")
                return
            status, said = finish(start(folder, *RESUME, **arguments))
        problems = []
        if status != 2 or not said.strip().splitlines()[-1].startswith("error: ") or "Traceback" in said:
            problems.append(f"exit status {status}: {said[-500:]}")
        if (folder / LAST).read_bytes() != before or leftovers(folder):
            problems.append("the old checkpoint was touched, or a part of the new one is left")
        self.complete(scenario, name, folder, problems, [], {})

    def poisoned(self, scenario: str, name: str, what: str) -> None:
        """A loss or a gradient that is not finite at step 30: an error, and nothing of it is kept."""
        folder = self.folder()
        status, said = finish(start(folder, *first_command(SETTINGS[name], 0), STRESS_POISON=f"{what} 30"))
        content = read_checkpoint(folder / LAST)
        problems = []
        if status != 2 or f"step 30: the {'loss' if what == 'loss' else 'norm of the gradient'}, " not in said:
            problems.append(f"exit status {status}: {said[-500:]}")
        if content["global_step"] != 30 or not all(t.isfinite().all() for t in content["state_dict"].values()):
            problems.append("the last checkpoint is not the finite one of step 30")
        self.complete(scenario, name, folder, problems, [], {})

    def damaged(self, name: str, rng: random.Random) -> None:
        """60 single bits flipped, each refused or of no effect; parts of a file, and code in it, refused."""
        last = self.reference(name) / LAST
        sound, expected, copy = last.read_bytes(), read_checkpoint(last), self.root / "damaged.ckpt"
        for _ in range(60):
            damaged = bytearray(sound)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            copy.write_bytes(damaged)
            self.note("one bit flipped", True, is_refused(copy) or not [*differences(expected, read_checkpoint(copy))])
        for content in [b"", *(sound[: rng.randrange(len(sound))] for _ in range(9))]:
            copy.write_bytes(content)
            self.note("cut short or empty", True, is_refused(copy))
        torch.save({**expected, "hparams_name": Malicious()}, copy)
        self.note("code in the file", True, is_refused(copy))

    def complete(
        self, scenario: str, name: str, folder: Path, problems: list[str], lost: list[int], env: dict[str, str]
    ) -> None:
        """Let a stopped run go on to its end and compare it."""
        status, said = finish(start(folder, *next_command(folder, SETTINGS[name]), **env))
        if status != 0:
            problems.append(f"it does not go on, exit status {status}: {said[-300:]}")
        if leftovers(folder):
            problems.append(f"left behind: {leftovers(folder)}")
        found = compare(folder, self.reference(name)) if status == 0 else ["lost"]
        if (problems or found) and scenario != INEXACT:
            print(f"{scenario}: {'; '.join(problems + found[:3])}", flush=True)
        self.note(scenario, not problems, not found, lost)
        shutil.rmtree(folder)

    def note(self, scenario: str, survived: bool, equal: bool, lost: list[int] | None = None) -> None:
        with self.lock:
            outcome = self.outcomes[scenario]
            outcome.tried += 1
            outcome.survived += survived
            outcome.equal += equal
            outcome.lost += lost or []


def trials(stress: Stress, rng: random.Random) -> Iterator[Any]:
    """Functions and their arguments without end: every kind of trouble once, then rounds of stops."""
    elsewhere = {"TMPDIR": "/dev/shm"} if Path("/dev/shm").is_dir() else {}
    yield stress.stopped, INEXACT, "validations", [stop_at(rng, signal.SIGTERM, 50)], {"STRESS_INEXACT": "1"}
    yield stress.unwritable, "full disk", "validations", full_disk
    yield stress.unwritable, "read-only folder", "validations", read_only
    for what in ("loss", "gradient"):
        yield stress.poisoned, f"{what} not finite", "validations", what
    yield stress.stopped, "temporary files on another device", "30 MB", [in_a_save(rng)], elsewhere
    while True:
        for name in ("accumulation", "epochs", "validations", "sgd, 32 bits"):
            last_step = read_checkpoint(stress.reference(name) / LAST)["global_step"]
            yield stress.stopped, f"chains of 2 to 6 stops, {name}", name, chain(rng, last_step), {}
            yield (
                stress.stopped,
                "stopped in a validation",
                rng.choice(["accumulation", "validations"]),
                [in_a_validation(rng)],
                {},
            )
            yield stress.stopped, "SIGKILL inside a save of 30 MB", "30 MB", [in_a_save(rng)], {}
            for kind in EXIT_STATUS:
                yield stress.stopped, kind.name, name, [stop_at(rng, kind, rng.randrange(1, last_step))], {}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description=__doc__)
    parser.add_argument("--trials", type=int, default=140, help="runs that are stopped, resumed and compared")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--processes", type=int, default=1, help="that train a run together")
    arguments = parser.parse_args(argv)
    rng = random.Random(arguments.seed)
    with (
        default_signals(signal.SIGINT),
        tempfile.TemporaryDirectory() as temporary,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        if arguments.processes > 1:
            sys.path.insert(0, str(ROOT / "tests"))
            import stress_processes

            found = stress_processes.trials(Path(temporary), arguments.processes, rng, arguments.trials)
            return 0 if stress_processes.report(found) else 1
        stress = Stress(Path(temporary))
        stress.damaged("validations", rng)
        for trial in [pool.submit(*trial) for trial in islice(trials(stress, rng), arguments.trials)]:
            trial.result()
    print("\n| scenario | tried | survived | bitwise equal | steps lost, median and most |\n|---|---|---|---|---|")
    for scenario, outcome in sorted(stress.outcomes.items()):
        lost = f"{statistics.median(outcome.lost):g}, {max(outcome.lost)}" if outcome.lost else ""
        print(f"| {scenario} | {outcome.tried} | {outcome.survived} | {outcome.equal} | {lost} |")
    print("\nSIGKILLs " + ", ".join(f"{where} {number}" for where, number in stress.kills.items()))
    inexact = stress.outcomes.pop(INEXACT)
    is_exact = all(outcome.tried == outcome.survived == outcome.equal for outcome in stress.outcomes.values())
    return 0 if is_exact and inexact.equal == 0 else 1


if __name__ == "__main__":
    with ends_in_one_line():
        sys.exit(main())

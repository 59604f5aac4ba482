"""Stop runs of several processes: any signal, to any of them, at any time; part of `python -m tests.stress`.

Every stop must leave no process after 15 seconds, one sound checkpoint, the right exit status and one message, and
the run, resumed, must end with the same bits as one that was never stopped. `python -m tests.stress --processes 2
--trials 60 --seed 11` took 14 minutes on two CPU cores, and ended with `60 stops in 20 runs, of which 20 ended bitwise
equal` and this table. Moments of "evaluating" are rarely met: such a command takes less time than it does to start.

| moment | signal | stops | longest until no process was left |
|---|---|---|---|
| closing | SIGHUP | 1 | 5.2 s |
| closing | SIGINT | 2 | 0.6 s |
| closing | SIGKILL | 2 | 5.0 s |
| closing | SIGTERM | 3 | 1.1 s |
| evaluating | SIGINT | 1 | 0.0 s |
| evaluating | SIGKILL | 1 | 0.0 s |
| evaluating | SIGTERM | 3 | 0.0 s |
| evaluating | SIGUSR1 | 3 | 0.0 s |
| save | SIGHUP | 1 | 2.0 s |
| save | SIGINT | 1 | 1.2 s |
| save | SIGKILL | 6 | 4.5 s |
| save | SIGTERM | 1 | 2.0 s |
| starting | SIGHUP | 1 | 0.0 s |
| starting | SIGINT | 1 | 1.1 s |
| starting | SIGKILL | 3 | 3.4 s |
| starting | SIGTERM | 2 | 5.0 s |
| starting | SIGUSR1 | 6 | 3.9 s |
| training | SIGHUP | 2 | 1.3 s |
| training | SIGINT | 4 | 1.3 s |
| training | SIGKILL | 3 | 5.0 s |
| training | SIGTERM | 2 | 1.2 s |
| validation | SIGHUP | 1 | 0.6 s |
| validation | SIGINT | 4 | 1.1 s |
| validation | SIGKILL | 1 | 0.0 s |
| validation | SIGTERM | 3 | 1.2 s |
| validation | SIGUSR1 | 2 | 0.0 s |
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from stress import LAST, PATIENCE, RESUME, ROOT, SETTINGS, compare, first_command, leftovers, step_of, trace

from slm.errors import InputError
from slm.run.checkpoint import read_checkpoint
from slm.run.control import LOST

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGKILL]
TARGETS = ["rank 0", "last rank", "all ranks", "launcher"]
MOMENTS = ["starting", "training", "validation", "save", "closing", "evaluating"]
LONGEST = 15.0
"""Seconds until no process may be left, where the machine is free."""


@dataclass
class Run:
    """The processes of a command, found by a variable in their environment."""

    folder: Path
    process: subprocess.Popen[str]
    mark: str

    def pids(self) -> dict[int, str]:
        """The living processes, with their rank; empty for the launcher."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
                is_zombie = b") Z" in (folder / "stat").read_bytes()
            except OSError:
                continue
            if self.mark.encode() in variables and not is_zombie:
                ranks = [v.removeprefix(b"RANK=").decode() for v in variables if v.startswith(b"RANK=")]
                found[int(folder.name)] = ranks[0] if ranks else ""
        return found

    def send(self, signum: int, target: str, num_processes: int) -> None:
        """Send a signal to the launcher, to one rank or to all, but not to their workers."""
        names = {"rank 0": {"0"}, "last rank": {str(num_processes - 1)}, "launcher": {""}}
        wanted = names.get(target, {str(rank) for rank in range(num_processes)})
        seen: set[str] = set()
        for pid, rank in sorted(self.pids().items()):
            if rank in wanted and rank not in seen:
                seen.add(rank)  # the first is the rank itself
                os.kill(pid, signum)


def start(folder: Path, *argv: str, launcher: list[str] | None = None, **env: str) -> Run:
    mark = f"STRESS_ID={uuid.uuid4().hex}"
    (folder / "trace").touch()
    process = subprocess.Popen(
        [sys.executable, *(launcher or []), str(ROOT / "train.py"), *argv],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests"), **env, **dict([mark.split("=")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    return Run(folder, process, mark)


@dataclass
class Outcomes:
    """What became of the stops, by moment and signal."""

    tried: dict[tuple[str, str], int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    longest: dict[tuple[str, str], float] = field(default_factory=dict)
    chains: int = 0
    equal: int = 0


def wait_until(run: Run, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while run.process.poll() is None and not condition() and time.monotonic() < deadline:
        time.sleep(0.001)


def at_moment(run: Run, moment: str, rng: random.Random) -> None:
    """Wait for a random instant of that kind."""
    folder = run.folder
    before, validations = step_of(folder), trace(folder).count("validation")
    if moment == "starting":
        wait_until(run, lambda: len(run.pids()) > 1)
        time.sleep(rng.uniform(0, 9))
    elif moment == "training":
        goal = before + rng.randrange(1, 20)
        wait_until(run, lambda: step_of(folder) >= goal)
        time.sleep(rng.uniform(0, 0.05))
    elif moment == "validation":
        goal = validations + rng.randrange(1, 12)
        wait_until(run, lambda: trace(folder).count("validation") >= goal)
    elif moment == "save":
        kept = folder / LAST.parent
        wait_until(run, lambda: kept.is_dir() and any(name.endswith(".unfinished") for name in os.listdir(kept)))
    elif moment == "closing":
        wait_until(run, lambda: "closing" in trace(folder))
    elif moment == "evaluating":
        wait_until(run, lambda: len(run.pids()) > 1)
        time.sleep(rng.uniform(3, 9))


def expected_statuses(signum: signal.Signals, target: str, is_torchrun: bool) -> set[int]:
    """Of the command, where the signal came in time; torchrun has its own."""
    if target == "launcher" and signum == signal.SIGKILL:
        return {-signal.SIGKILL}
    if is_torchrun:
        return {*range(1, 256), *(-s for s in SIGNALS)}
    return {128 + signum, LOST} if signum == signal.SIGKILL else {128 + signum, -signum}  # a shell calls both 128 + n


def stop(
    run: Run, signum: signal.Signals, target: str, num: int, is_torchrun: bool, moment: str = "training"
) -> tuple[list[str], float]:
    """Send the signal, and see what comes of it: the problems, and the seconds until no process was left."""
    is_running = run.process.poll() is None
    run.send(signum, target, num)
    sent = time.monotonic()
    while run.pids() and time.monotonic() < sent + PATIENCE:
        time.sleep(0.05)
    seconds, problems = time.monotonic() - sent, []
    if left := run.pids():
        problems.append(f"ranks {sorted(left.values())} are still there after {seconds:.0f} seconds")
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    said = run.process.communicate()[0]
    status = run.process.returncode
    has_ended = re.search(r"^(run  |validate: the held-out split)", said, re.M)
    if is_running and not (has_ended and status == 0) and status not in expected_statuses(signum, target, is_torchrun):
        problems.append(f"exit status {status}")
    said = re.sub(r"Exception ignored in(.*\n)+?slm\.run\.signals\.Stopped.*\n", "", said)  # Python's, at a fork
    messages = [
        line for line in said.splitlines() if re.match("stopped by|error:|(another )?process .* (gone|ended by)", line)
    ]
    is_silent = is_torchrun or moment == "starting" or (target == "launcher" and signum == signal.SIGKILL)
    fewest = 0 if has_ended or is_silent or not is_running else 1  # a process that starts may be alone to know
    if not fewest <= len(messages) <= 1 or ("Traceback" in said and not is_torchrun):
        problems.append(f"it said {said[-1500:]}")
    last = run.folder / LAST
    if last.is_file():
        try:
            read_checkpoint(last)
        except InputError as error:
            problems.append(str(error))
    return problems, seconds


def chain(folder: Path, reference: Path, name: str, num: int, rng: random.Random, stops: int, found: Outcomes) -> None:
    """One run that is stopped some times, each time in another way, and resumed to its end."""
    is_torchrun = rng.random() < 0.3
    launcher = [
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={num}",
        f"--master_port={rng.randrange(20000, 40000)}",
    ]
    options = {"launcher": launcher} if is_torchrun else {}
    devices = [] if is_torchrun else [f"--trainer.devices={num}"]

    def command() -> list[str]:
        if (folder / "runs/version_0/config.yaml").exists():
            return [*RESUME, *devices]
        return [*first_command(SETTINGS[name]), *devices]

    for _ in range(stops):
        moment, signum, target = rng.choice(MOMENTS), rng.choice(SIGNALS), rng.choice(TARGETS)
        argv = command()
        if moment == "evaluating" and (folder / LAST.parent / "best.ckpt").exists():
            argv = ["validate", "--ckpt_path=best", *devices, "--trainer.accelerator=cpu"]
        elif moment == "evaluating":
            moment = "training"
        slow = {"STRESS_SLOW_SAVES": "1"} if moment == "save" else {}
        run = start(folder, *argv, **options, **slow)  # type: ignore[arg-type]
        at_moment(run, moment, rng)
        problems, seconds = stop(run, signum, target, num, is_torchrun, moment)
        if seconds > LONGEST:
            problems.append(f"it took {seconds:.0f} seconds")
        key = moment, signum.name
        found.tried[key] = found.tried.get(key, 0) + 1
        found.longest[key] = max(found.longest.get(key, 0.0), seconds)
        what = f"{name}, {'torchrun' if is_torchrun else 'train.py'}, {moment}: {signum.name} to {target}"
        print(f"{what}, at step {step_of(folder)}: {seconds:.1f} s", *problems, flush=True)
        found.problems += [f"{what}: {problem}" for problem in problems]
    run = start(folder, *command(), **options)  # type: ignore[arg-type]
    said = run.process.communicate(timeout=PATIENCE)[0]
    found.chains += 1
    differences = compare(folder, reference) if run.process.returncode == 0 else [said[-1500:]]
    if leftovers(folder):
        differences.append(f"left behind: {leftovers(folder)}")
    if len(list((folder / "runs").iterdir())) > 1:
        differences.append("there is a second run")
    found.equal += not differences
    found.problems += [f"{name}: {difference}" for difference in differences[:3]]


def trials(root: Path, num: int, rng: random.Random, num_stops: int) -> Outcomes:
    """Chains of stops, until there were that many."""
    found, references = Outcomes(), {}
    names = ["validations", "accumulation", "epochs"]
    while sum(found.tried.values()) < num_stops:
        name = rng.choice(names)
        if name not in references:
            references[name] = root / f"uninterrupted, {name}"
            references[name].mkdir()
            run = start(references[name], *first_command(SETTINGS[name], 0), f"--trainer.devices={num}")
            said = run.process.communicate(timeout=PATIENCE)[0]
            assert run.process.returncode == 0, said
        folder = root / uuid.uuid4().hex
        folder.mkdir()
        left = num_stops - sum(found.tried.values())
        chain(folder, references[name], name, num, rng, min(left, rng.randrange(2, 6)), found)
    return found


def report(found: Outcomes) -> bool:
    """Print the table; returns whether all was right."""
    print("\n| moment | signal | stops | longest until no process was left |\n|---|---|---|---|")
    for (moment, name), number in sorted(found.tried.items()):
        print(f"| {moment} | {name} | {number} | {found.longest[moment, name]:.1f} s |")
    print(f"\n{sum(found.tried.values())} stops in {found.chains} runs, of which {found.equal} ended bitwise equal")
    for problem in found.problems:
        print(f"- {problem}")
    return not found.problems and found.chains == found.equal

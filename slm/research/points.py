"""The points of a sweep: which runs it has, and how each is trained once, whoever else trains beside it.

A point is a command line of `train.py`, and its run an ordinary one. The job that trains it is named after its settings
(`slm.run.job`), so a point that was stopped goes on in its run. `runs/sweep/` holds for each point a lock, what its
command said, and, once it has ended, what it reached.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO

from slm.command.flags import LINKED
from slm.command.settings import Command, flat, read_command
from slm.durable import lock, replace_file
from slm.errors import InputError, Stopped, check
from slm.research.runs import UNTOLD, compared_by, read_run
from slm.run.checkpoint import RUNS, last_checkpoint
from slm.run.folder import hold
from slm.run.job import HELD, NAME, is_run_of_named_job, run_of_named_job

FOLDER = "sweep"
SECONDS_BETWEEN_LOOKS = 2.0
LINKED_SETTINGS = tuple(f"model.{name}" for name in LINKED)
OF_A_LAUNCHER = ("SLURM_", "TORCHELASTIC_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
"""Environment variables that would make a point a rank of something else."""
Flags = Sequence[tuple[str, Sequence[str]]]
"""The flags of a command line in their order, each with its values."""


@dataclass(frozen=True)
class Point:
    """A run of a sweep.

    Attributes:
        argv: its flags for `train.py`.
        varied: those of them that the sweep varies.
    """

    argv: tuple[str, ...]
    varied: tuple[str, ...]

    def command(self) -> Command:
        """Read; raises InputError for what is wrong in it, sizes that do not fit together included."""
        command = read_command(self.argv)
        command.new_model(on_meta=True)
        return command

    def __str__(self) -> str:
        return " ".join(self.varied)


@dataclass(frozen=True)
class Result:
    """What a point reached.

    Attributes:
        run: the folder of its run.
        loss: its best validation, in bits per byte where that is known, else in nats per token; None for none.
    """

    run: Path
    loss: float | None


def split(argv: Sequence[str]) -> Flags:
    """A command line as flags with their values, of which one may have several; raises InputError for another word."""
    flags: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") or word in ("-c", "-h"):
            name, equals, value = word.partition("=")
            flags.append((name, [value] if equals else []))
        else:
            check(bool(flags), f"{word}: a sweep trains, give it the flags of train.py alone")
            flags[-1][1].append(word)
    return flags


def grid(flags: Flags) -> list[Point]:
    """A point for every combination of values, the last flag varying fastest."""
    words = [[f"{name}={value}" for value in values] or [name] for name, values in flags]
    is_varied = [len(values) > 1 for _, values in flags]
    return [Point(argv, tuple(itertools.compress(argv, is_varied))) for argv in itertools.product(*words)]


def key_of(settings: Mapping[str, object]) -> str:
    """A name for settings, the same for the same ones."""
    return blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


class Points:
    """The points that have runs in one folder.

    Args:
        runs: the folder of their runs.
    """

    def __init__(self, runs: Path) -> None:
        self.runs, self.folder = runs, runs / FOLDER
        self._fingerprints: dict[str, str | None] = {}

    def make_folder(self) -> None:
        """For what is kept of points while they are trained; raises InputError where it cannot be made."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            remedy = "give another --trainer.default_root_dir"
            raise InputError(f"{self.folder} cannot be made: {error.strerror}; {remedy}") from error

    def key(self, point: Point) -> str:
        """A point's name, of its settings and its data; raises InputError where its command line cannot be used."""
        command = point.command()
        settings = {name: value for name, value in flat(command.settings.as_dict()) if not name.startswith(UNTOLD)}
        kept = key_of({name: settings[name] for name in settings if name.startswith(("data.", *LINKED_SETTINGS))})
        if kept not in self._fingerprints:
            data = command.new_data(command.new_model(on_meta=True))
            data.setup()
            self._fingerprints[kept] = data.fingerprint
        return key_of({**settings, "fingerprint": self._fingerprints[kept]})

    def result(self, key: str) -> Result | None:
        """What a point reached; None while it has not ended, and where its run has gone since."""
        file = self.folder / f"{key}.json"
        if not file.is_file():
            return None
        content = json.loads(file.read_text())
        run = self.runs / content["run"]
        is_there = (run / "config.yaml").is_file() and is_run_of_named_job(run, f"{FOLDER} {key}")
        return Result(run, content["loss"]) if is_there else None

    @contextlib.contextmanager
    def claimed(self, key: str, waits: bool = False) -> Iterator[bool]:
        """Whether the body may train a point, which nothing else does meanwhile; a process that is killed lets go."""
        with (self.folder / f"{key}.lock").open("w") as file:
            try:
                lock(file, waits)
                is_ours = True
            except BlockingIOError:
                is_ours = False
            yield is_ours

    def is_trained_elsewhere(self, key: str) -> bool:
        """Whether the run of a point is held by a process that outlived the sweep that started it."""
        run = run_of_named_job(self.runs, f"{FOLDER} {key}")
        if run is None:
            return False
        try:
            hold(run).close()
        except InputError:
            return True
        return False

    def train(self, key: str, point: Point, is_hopeless: Callable[[Path], bool] | None = None) -> Result | None:
        """Train a point to its end, from where it was left.

        Args:
            key: its name.
            point: it, which must be claimed.
            is_hopeless: is shown the run after each validation, and says whether to stop it.

        Returns:
            what it reached; None where it was stopped as hopeless.

        Raises:
            InputError: it failed, for the reason that the message gives.
        """
        job = f"{FOLDER} {key}"
        log = self.folder / f"{key}.log"
        with log.open("a") as said:
            said_before = said.tell()
            status, is_given_up = self._run(job, point, said, is_hopeless)
        if is_given_up and status:
            return None
        lines = log.read_bytes()[said_before:].decode(errors="replace").splitlines()
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        reason = errors[-1] if errors else f"it ended with status {status}"
        check(status == 0, f"{reason} ({log})")
        run = run_of_named_job(self.runs, job)
        if run is None:
            raise InputError(f"it kept no run: leave out trainer.fast_dev_run ({log})")
        reached = read_run(run)
        loss = reached.best(compared_by(reached.curves))
        content = json.dumps({"run": run.name, "loss": loss, "flags": point.varied}, indent=1)
        replace_file(self.folder / f"{key}.json", content.encode())
        return Result(run, loss)

    def _run(
        self, job: str, point: Point, said: IO[str], is_hopeless: Callable[[Path], bool] | None
    ) -> tuple[int, bool]:
        """The exit status of a point's command, and whether it was stopped as hopeless."""
        command = [sys.executable, "-m", "slm.cli", *point.argv]
        # a session of its own, so that Ctrl-C reaches it through us alone: a second one would not let it save
        others = {name: value for name, value in os.environ.items() if not name.startswith(OF_A_LAUNCHER)}
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            env={**others, NAME: job, HELD: "1"},
            start_new_session=True,
        )
        saved = 0.0
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return child.wait(SECONDS_BETWEEN_LOOKS), False
                run = run_of_named_job(self.runs, job) if is_hopeless else None
                if is_hopeless is None or run is None or not last_checkpoint(run).is_file():
                    continue
                before, saved = saved, last_checkpoint(run).stat().st_mtime
                if saved != before and is_hopeless(run):
                    child.send_signal(signal.SIGTERM)
                    return child.wait(), True
        except BaseException as error:
            signum = error.signum if isinstance(error, Stopped) else signal.SIGTERM
            child.send_signal(signum)
            while child.poll() is None:
                with contextlib.suppress(Stopped):  # heard once more
                    child.wait()
                    break
                child.send_signal(signum)
            raise


def runs_of(command: Command) -> Path:
    """The folder that a command puts its run into."""
    return Path(command.settings.trainer.default_root_dir or "") / RUNS

"""The folder of a run: claimed, held by one process, made ready, and removed where nothing came of it."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from slm.durable import lock, replace_file, sweep
from slm.errors import InputError, check
from slm.run.callbacks import CURVES
from slm.run.checkpoint import RUNS, run_numbers
from slm.run.job import note_job
from slm.run.signals import Progress


class RunFolder:
    """The folder of one run, for as long as it is trained in.

    As a context manager it lets go of the folder at the end; a new one in which no step was trained is removed where
    the body fails, unless it holds a checkpoint all the same.

    Args:
        path: the folder of a run that goes on; None makes a new one under `runs`, by rank 0.
        runs: where that is made.
        progress: is told the folder, and says how many steps are done.

    Raises:
        InputError: it cannot be made or written to, or another process holds it.
    """

    def __init__(self, path: Path | None, runs: Path, progress: Progress) -> None:
        self.is_new = path is None
        processes = progress.control.processes
        self.is_mine = processes.rank == 0
        new = claim_run(runs) if path is None and self.is_mine else None
        self.path = path or Path(processes.from_rank_zero(str(new)))
        self._progress, progress.run = progress, self.path
        self._first_step = 0
        self._held: IO[str] | None = None

    def prepare(self, content: Mapping[str, Any], config: str, tokenizer: str | None, argv: Sequence[str]) -> None:
        """Put into the folder what it needs before the training begins.

        Args:
            content: of the checkpoint that the run goes on from; empty for none.
            config: the settings in force.
            tokenizer: of the data.
            argv: the command line, for a job that is requeued.
        """
        self._first_step = content.get("global_step", 0)
        if not self.is_mine:
            return
        self._held = hold(self.path)
        if not self.is_new:
            take_over(self.path, content)
        if not content:
            begin(self.path, config, tokenizer)
        note_job(self.path, argv)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self._held is not None:
            self._held.close()  # some file systems keep what is open
        kept = self.path / "checkpoints"
        is_unused = self._progress.steps() <= self._first_step and not (kept.is_dir() and any(kept.iterdir()))
        if error is not None and self.is_new and self.is_mine and is_unused:
            shutil.rmtree(self.path, ignore_errors=True)


def claim_run(runs: Path = RUNS) -> Path:
    """Make and return the next run folder; two processes at once get two folders.

    Raises:
        InputError: the folder cannot be made.
    """
    try:
        runs.mkdir(parents=True, exist_ok=True)
        while True:
            run = runs / f"version_{max(run_numbers(runs), default=-1) + 1}"
            try:
                run.mkdir()
            except FileExistsError:
                continue
            return run
    except OSError as error:
        raise InputError(
            f"the run folder cannot be made under {runs.absolute()}: {error.strerror}; "
            "start the command in a folder that you can write to"
        ) from error


def hold(run: Path) -> IO[str]:
    """Hold a run's folder for as long as the file that is returned is open, or its process lives.

    Raises:
        InputError: another process holds it, or it cannot be written to.
    """
    try:
        file = (run / ".lock").open("w")
    except OSError as error:
        message = f"{run} cannot be written to: {error.strerror}; permit it, or copy the run to where you may write"
        raise InputError(message) from error
    try:
        lock(file)
    except BlockingIOError as error:
        raise InputError(f"{run} is being trained by another process: stop that first") from error
    return file


def begin(run: Path, config: str, tokenizer: str | None) -> None:
    """Put into the folder of a new run its settings and, where it is a `tokenizer.json`, its tokenizer."""
    replace_file(run / "config.yaml", config.encode())
    if tokenizer not in (None, "bytes"):
        replace_file(run / "tokenizer.json", tokenizer.encode())


def take_over(run: Path, content: Mapping[str, Any]) -> None:
    """Make the folder of a run that was stopped ready to go on from this content of a checkpoint.

    What a killed process left half-written is removed. So are the curves of a process that was killed before it saved
    anything, where it may have drawn the result of a validation that is still to be done: TensorBoard hides what lies
    past the step that a run goes on from, and this belongs to the very step. It is drawn once more.

    Raises:
        InputError: the folder cannot be written to.
    """
    kept = run / "checkpoints"
    check(os.access(kept, os.W_OK) or not kept.exists(), f"{kept} cannot be written to: permit it")
    sweep(run)
    sweep(kept)
    if content.get("position", {}).get("is_unvalidated"):
        for file in run.glob(CURVES):
            if file.name not in content.get("curves", []):
                file.unlink()

"""A job that is started again, by SLURM, by torchrun or under a name in `SLM_JOB`, goes on in the same run.

`#SBATCH --signal=USR1@90` lets SLURM tell a job 90 seconds before its time is over: it saves, and asks for another
turn. `torchrun --max_restarts 3` starts all processes again when one of them fails.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from slm.durable import replace_file
from slm.messages import say
from slm.run.checkpoint import run_folders

JOB_FILE = "job"
"""In a run's folder: the job that trains it, and the arguments that it was started with."""
NAME = "SLM_JOB"
"""The environment variable that names a job, which trains one run, whoever starts it."""
HELD = "SLM_HELD"
"""Set by a parent that keeps the standard input of a run open until it ends itself."""


def end_with_holder() -> None:
    """Where `SLM_HELD` is set, end this process as SIGTERM does when the one that started it has gone."""
    if os.environ.pop(HELD, None) is None:
        return

    held = os.dup(0)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)

    def wait() -> None:
        os.read(held, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def is_slurm_job() -> bool:
    """Whether SLURM started this process."""
    return _slurm_job() is not None


def requeue() -> None:
    """Ask SLURM to start this job once more; where it does not, that is said.

    SLURM ends the job as it requeues it, which must not cut short what is said and the exit status.
    """
    for signum in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    job = _slurm_job()
    try:
        subprocess.run(["scontrol", "requeue", str(job)], check=True, capture_output=True, text=True)
        say(f"SLURM job {job} is requeued, and goes on from there")
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (error.stderr or str(error)).strip() if isinstance(error, subprocess.CalledProcessError) else error
        say(f"the job is not requeued: {reason}")


def note_job(run: Path, argv: Sequence[str]) -> None:
    """Write into a run's folder which job trains it, and with which arguments; a job may train several runs."""
    if (job := _job()) is not None:
        replace_file(run / JOB_FILE, _noted(job, argv))


def run_of_job(runs: Path, argv: Sequence[str]) -> Path | None:
    """The run that this job trained with these arguments before it was started again; None where there is none."""
    job = _job()
    is_first_turn = _slurm_job() is not None and os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
    is_told_apart = NAME in os.environ or not is_first_turn or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return _newest_with(runs, _noted(job, argv)) if job is not None and is_told_apart else None


def run_of_named_job(runs: Path, name: str) -> Path | None:
    """The run that the job of a name in `SLM_JOB` trains; None where there is none."""
    return _newest_with(runs, _with_lines(name))


def is_run_of_named_job(run: Path, name: str) -> bool:
    """Whether that job trained this run."""
    file = run / JOB_FILE
    return file.is_file() and file.read_bytes() == _with_lines(name)


def _newest_with(runs: Path, noted: bytes) -> Path | None:
    files = (run / JOB_FILE for run in run_folders(runs))
    return next((file.parent for file in files if file.is_file() and file.read_bytes() == noted), None)


def _noted(job: str, argv: Sequence[str]) -> bytes:
    return _with_lines(job) if NAME in os.environ else _with_lines(job, *argv)


def _with_lines(*lines: str) -> bytes:
    return ("\n".join(lines) + "\n").encode(errors="surrogateescape")


def _job() -> str | None:
    return os.environ.get(NAME) or _slurm_job() or _torchrun_job()


def _torchrun_job() -> str | None:
    """The id that torchrun was given, by default always "none", with its process and when that began."""
    run_id, parent = os.environ.get("TORCHELASTIC_RUN_ID"), os.getppid()
    if run_id is None:
        return None
    stat = Path(f"/proc/{parent}/stat")
    began = stat.read_text().rpartition(")")[2].split()[19] if stat.is_file() else ""
    return f"torchrun {run_id} {parent} {began}"


def _slurm_job() -> str | None:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")

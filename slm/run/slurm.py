"""Requeued by SLURM: a job that is told so saves, asks for another turn, and goes on in the same run.

`#SBATCH --signal=USR1@90` lets SLURM tell it 90 seconds before its time is over.
"""

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lightning.fabric.plugins.environments import SLURMEnvironment

from slm.durable import replace_file
from slm.messages import say
from slm.run.checkpoint import run_folders

JOB_FILE = "slurm_job"
"""In a run's folder: the job that trains it, and the arguments that it was started with."""


def requeue_signals() -> list[signal.Signals]:
    """SIGUSR1 within a job of SLURM, and nothing elsewhere."""
    is_in_job = _job() is not None or SLURMEnvironment.detect()
    return [signal.SIGUSR1] if is_in_job and hasattr(signal, "SIGUSR1") else []


def requeue() -> None:
    """Ask SLURM to start this job once more; where it does not, that is said.

    SLURM ends the job as it requeues it, which must not cut short what is said and the exit status.
    """
    for signum in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    job = _job()
    try:
        if job is None:
            raise OSError("SLURM_JOB_ID is not set")
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
        say(f"SLURM job {job} is requeued, and goes on from there")
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (error.stderr or str(error)).strip() if isinstance(error, subprocess.CalledProcessError) else error
        say(f"the job is not requeued: {reason}")


def note_job(run: Path, argv: Sequence[str]) -> None:
    """Write into a run's folder which job trains it, and with which arguments; a job may train several runs."""
    if (job := _job()) is not None:
        replace_file(run / JOB_FILE, _noted(job, argv).encode(errors="surrogateescape"))


def requeued_run(runs: Path, argv: Sequence[str]) -> Path | None:
    """The run that this job trained with these arguments before it was requeued; None for none that was kept."""
    job = _job()
    if job is None or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return None
    noted = _noted(job, argv).encode(errors="surrogateescape")
    for run in run_folders(runs):
        file = run / JOB_FILE
        if file.is_file() and file.read_bytes() == noted and (run / "checkpoints" / "last.ckpt").is_file():
            return run
    return None


def _noted(job: str, argv: Sequence[str]) -> str:
    return "\n".join([job, *argv]) + "\n"


def _job() -> str | None:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")

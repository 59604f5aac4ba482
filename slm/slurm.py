"""Requeued by SLURM: a job that is told so saves, asks for another turn, and goes on in the same run.

`#SBATCH --signal=USR1@90` lets SLURM tell it 90 seconds before its time is over.
"""

import os
import signal
import subprocess
from pathlib import Path

from lightning.fabric.plugins.environments import SLURMEnvironment

from slm.checkpoint import run_folders
from slm.durable import replace_file
from slm.notices import say

JOB_FILE = "slurm_job"
"""In a run's folder: the job that trains it."""


def requeue_signals() -> list[signal.Signals]:
    """SIGUSR1 within a job of SLURM, and nothing elsewhere."""
    is_in_job = _job() is not None or SLURMEnvironment.detect()
    return [signal.SIGUSR1] if is_in_job and hasattr(signal, "SIGUSR1") else []


def requeue() -> None:
    """Ask SLURM to start this job once more; where it does not, that is said."""
    job = _job()
    try:
        if job is None:
            raise OSError("SLURM_JOB_ID is not set")
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
        say(f"SLURM job {job} is requeued, and goes on from there")
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (error.stderr or str(error)).strip() if isinstance(error, subprocess.CalledProcessError) else error
        say(f"the job is not requeued: {reason}")


def note_job(run: Path) -> None:
    """Write into a run's folder which job trains it."""
    if (job := _job()) is not None:
        replace_file(run / JOB_FILE, job.encode())


def requeued_run(runs: Path) -> Path | None:
    """The run that this job trained before it was requeued; None where there is none, or nothing of it is kept."""
    job = _job()
    if job is None or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return None
    for run in run_folders(runs):
        noted = run / JOB_FILE
        if noted.is_file() and noted.read_text(encoding="utf-8") == job:
            return run if (run / "checkpoints" / "last.ckpt").is_file() else None
    return None


def _job() -> str | None:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")

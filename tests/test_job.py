"""A job of SLURM that is requeued goes on in the same run, exactly, and in no other way than any stopped run."""

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import SMALL_FLAGS, UNSHOWN, run_command
from test_endings import signal_in

from slm.cli import main
from slm.run.checkpoint import read_checkpoint

Run = Callable[..., str]
SMALL = [
    *SMALL_FLAGS,
    *UNSHOWN,
    "--trainer.enable_progress_bar=false",
    "--data.batch_size=8",
    "--trainer.accelerator=cpu",
]
RUNS = Path("runs")


@pytest.fixture
def job(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A job of one process, with a `scontrol` that notes what it is asked for in a file."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGUSR1, signal.SIGTERM)}
    asked = workdir / "bin" / "asked"
    asked.parent.mkdir()
    asked.touch()
    scontrol = workdir / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    told = {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in told.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{workdir / 'bin'}:{os.environ['PATH']}")
    yield asked
    for signum, handler in before.items():  # a command ignores both from when it is requeued to its end
        signal.signal(signum, handler)


def last(run: str) -> dict[str, torch.Tensor]:
    return read_checkpoint(RUNS / run / "checkpoints/last.ckpt")["state_dict"]


def stopped(*argv: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main(list(argv))
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code


def test_a_requeued_job_goes_on_in_its_run_and_ends_with_the_same_bits(
    job: Path, slm: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slm(*SMALL, "--trainer.max_epochs=2")
    with monkeypatch.context() as patch:
        signal_in(patch, "training_step", signal.SIGUSR1, step=5)
        assert stopped(*SMALL, "--trainer.max_epochs=2") == 128 + signal.SIGUSR1
    assert job.read_text() == "requeue 7\n"
    assert "SLURM job 7 is requeued" in capsys.readouterr().err
    kept = {path.name for path in RUNS.rglob("*.ckpt")}
    assert kept == {"best.ckpt", "last.ckpt"}
    assert read_checkpoint(RUNS / "version_1/checkpoints/last.ckpt")["global_step"] == 6
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert "the job was started again: it goes on in runs/version_1" in slm(*SMALL, "--trainer.max_epochs=2")
    whole, requeued = last("version_0"), last("version_1")
    assert all(torch.equal(value, requeued[name]) for name, value in whole.items())
    assert {path.name for path in RUNS.iterdir()} == {"version_0", "version_1"}


@pytest.mark.slow
def test_a_requeued_job_that_began_with_the_weights_of_another_goes_on_with_its_own(
    job: Path, slm: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    slm(*SMALL, "--trainer.max_steps=2")
    argv = [*SMALL_FLAGS[6:], *SMALL[7:], "--init_from=runs/version_0", "--trainer.max_epochs=1"]
    with monkeypatch.context() as patch:
        signal_in(patch, "training_step", signal.SIGUSR1, step=3)
        assert stopped(*argv) == 138
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    slm(*argv)
    assert read_checkpoint(RUNS / "version_1/checkpoints/last.ckpt")["position"]["epoch"] == 1


def test_another_job_begins_a_run_of_its_own(job: Path, slm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    slm(*SMALL, "--trainer.max_steps=2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    slm(*SMALL, "--trainer.max_steps=2")
    assert {path.name for path in RUNS.iterdir()} == {"version_0", "version_1"}


@pytest.mark.slow
def test_each_command_of_a_job_goes_on_in_its_own_run(job: Path, slm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = ([*SMALL, f"--model.learning_rate={rate}", "--trainer.max_epochs=1"] for rate in (0.001, 0.01))
    slm(*slow)
    slm(*fast)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert "it goes on in runs/version_0" in slm(*slow)
    assert "it goes on in runs/version_1" in slm(*fast)


@pytest.mark.slow
def test_a_job_that_goes_on_from_a_copied_checkpoint_does_so_once(
    job: Path, slm: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    slm(*SMALL, "--trainer.max_steps=2")
    shutil.copy(RUNS / "version_0/checkpoints/last.ckpt", "copy.ckpt")
    argv = ["--ckpt_path=copy.ckpt", "--trainer.max_steps=6", "--trainer.enable_progress_bar=false"]
    with monkeypatch.context() as patch:
        signal_in(patch, "training_step", signal.SIGUSR1, step=3)
        assert stopped(*argv) == 138
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert "it goes on in runs/version_1" in slm(*argv)
    assert {path.name for path in RUNS.iterdir()} == {"version_0", "version_1"}


def test_a_job_of_which_nothing_is_kept_is_not_requeued(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signal_in(monkeypatch, "training_step", signal.SIGUSR1, step=3)
    assert stopped(*SMALL, "--trainer.enable_checkpointing=false") == 138
    assert "stopped by SIGUSR1 at step 3, of which nothing is kept" in capsys.readouterr().err
    assert job.read_text() == ""


def test_a_job_that_slurm_ends_as_it_requeues_it_still_says_so(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (job.parent / "scontrol").write_text("#!/bin/sh\nkill -TERM $PPID\nkill -USR1 $PPID\n")
    signal_in(monkeypatch, "validation_step", signal.SIGUSR1, step=5)
    assert stopped(*SMALL, "--trainer.val_check_interval=5") == 138
    assert "SLURM job 7 is requeued" in capsys.readouterr().err


def test_a_job_that_cannot_be_requeued_says_so_and_keeps_its_step(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (job.parent / "scontrol").write_text("#!/bin/sh\necho not permitted >&2\nexit 1\n")
    signal_in(monkeypatch, "training_step", signal.SIGUSR1, step=2)
    assert stopped(*SMALL) == 138
    said = capsys.readouterr().err
    assert "the job is not requeued: not permitted" in said
    assert re.search(r"stopped by SIGUSR1 at step 3, which is kept; go on with .*last.ckpt", said)


def test_a_job_says_for_which_of_its_tasks_it_waits(job: Path, workdir: Path) -> None:
    code = (
        "import slm.run.processes as p\np.SECONDS_OF_SILENCE, p.SECONDS_OF_PATIENCE = 0.1, 1.0\n"
        "from slm.cli import main\nmain([])\n"
    )
    result = run_command("-c", code, cwd=workdir, SLURM_NTASKS="4", SLURM_NTASKS_PER_NODE="4")
    missing = "3 of 4 processes, rank 1, 2, 3: each is started with srun"
    assert result.returncode == 2
    said, error = result.stderr.splitlines()
    assert said == f"waiting for {missing}"
    assert re.fullmatch(rf"error: given up after waiting 1 seconds for {missing}", error)
    assert not RUNS.exists()

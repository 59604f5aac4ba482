"""Several processes train the same run as one does, find each other, and are refused where they cannot."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL_FLAGS, UNSHOWN, not_of_the_machine, refusal, run_command
from lightning.pytorch import Callback, Trainer
from stress import default_signals
from stress_processes import Run, start, stop, wait_until

from slm.run.checkpoint import read_checkpoint
from slm.watch.tensorboard import read_curves

RUN = Path("runs/version_0")
LAST = RUN / "checkpoints/last.ckpt"
QUIET = [*UNSHOWN, "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"]
SMALL = [*SMALL_FLAGS, *QUIET, "--trainer.precision=64-true"]
TRAIN = str(ROOT / "train.py")
TWO = "--trainer.devices=2"


class Windows(Callback):
    """Writes the digest of every window that is trained on, with its step, to `windows_RANK`."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        here, _ = data.windows_in(batch_idx, is_training=True)
        with open(f"windows_{trainer.global_rank}", "a") as file:
            for tokens in batch[0][:here]:
                digest = hashlib.blake2b(tokens.numpy().tobytes(), digest_size=8).hexdigest()
                file.write(f"{trainer.global_step} {digest}\n")


class StopAt(Callback):
    """A SIGTERM to rank 0 after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_global_zero and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


WATCHED = json.dumps({"trainer": {"callbacks": [{"class_path": "test_processes.Windows"}]}})


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    with default_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield


def train(folder: Path, *argv: str, status: int = 0, **env: str) -> str:
    """Run the command in a folder, which must end with that status; returns what it says on stderr."""
    folder.mkdir(exist_ok=True)
    result = run_command(TRAIN, *argv, cwd=folder, PYTHONPATH=str(ROOT / "tests"), **env)
    assert result.returncode == status, result.stderr
    return result.stderr


def torchrun(folder: Path, *argv: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    flags = ["--nproc_per_node=2", f"--master_port={free_port()}", *options]
    return run_command("-m", "torch.distributed.run", *flags, TRAIN, *argv, cwd=folder, PYTHONPATH=str(ROOT / "tests"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def windows(folder: Path) -> list[str]:
    return sorted(line for file in folder.glob("windows_*") for line in file.read_text().splitlines())


def difference(a: Path, b: Path) -> float:
    """The largest between two runs' weights."""
    one, other = (read_checkpoint(folder / LAST)["state_dict"] for folder in (a, b))
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# ---- the same run


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_train_the_run_of_one(tmp_path: Path, optimizer: str) -> None:
    """With accumulation, clipping and a cosine, over epochs whose last batch is uneven."""
    flags = [
        *SMALL, "--data.num_tokens=10650", "--data.batch_size=32", "--trainer.max_epochs=-1", "--trainer.max_steps=50",
        "--trainer.accumulate_grad_batches=2", "--trainer.gradient_clip_val=0.3", f"--model.optimizer={optimizer}",
        "--model.schedule=cosine", "--config", WATCHED,
    ]  # fmt: skip
    train(tmp_path / "one", *flags)
    said = train(tmp_path / "two", *flags, TWO)
    assert not_of_the_machine(said) == [
        "2 processes share each batch of 32 windows, 16 on each: steps and learning rate mean what they do on one"
    ]
    one, two = windows(tmp_path / "one"), windows(tmp_path / "two")
    assert one == two
    assert len(one) > 50 * 32
    assert len((tmp_path / "two/windows_1").read_text().splitlines()) < len(two) / 2  # there were uneven batches
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-12
    curves, others = read_curves(tmp_path / "one" / RUN), read_curves(tmp_path / "two" / RUN)
    for tag in ("train/loss", "train/grad_norm", "train/tokens", "lr", "val/loss", "val/accuracy"):
        assert [step for step, _ in others[tag]] == [step for step, _ in curves[tag]]
        values, expected = ([value for _, value in points] for points in (others[tag], curves[tag]))
        assert values == pytest.approx(expected, rel=2e-7), tag  # the last digit of 32 bits


@pytest.mark.slow
def test_a_run_goes_on_under_another_number_of_processes_with_its_order_and_its_cosine(tmp_path: Path) -> None:
    flags = [*SMALL, "--data.batch_size=8", "--trainer.max_epochs=3", "--model.schedule=cosine"]
    train(tmp_path / "whole", *flags)

    def stopped_at(step: int) -> list[str]:
        callback = {"class_path": "test_processes.StopAt", "init_args": {"step": step}}
        return ["--config", json.dumps({"trainer": {"callbacks": [callback]}})]

    train(tmp_path / "parts", *flags, TWO, *stopped_at(20), status=143)
    train(tmp_path / "parts", "--ckpt_path=last", "--trainer.devices=1", *stopped_at(30), status=143)
    assert read_checkpoint(tmp_path / "parts" / LAST)["global_step"] == 30
    train(tmp_path / "parts", "--ckpt_path=last", TWO)
    assert difference(tmp_path / "whole", tmp_path / "parts") < 1e-12


@pytest.mark.slow
def test_each_process_has_dropout_masks_of_its_own_and_they_go_on_after_a_stop(tmp_path: Path) -> None:
    flags = [*SMALL_FLAGS, *QUIET, TWO, "--trainer.precision=32-true", "--model.dropout=0.3", "--trainer.max_epochs=1"]
    train(tmp_path / "whole", *flags)
    train(tmp_path / "parts", *flags, "--trainer.max_steps=2")
    first, second = (
        read_checkpoint(tmp_path / "parts" / LAST)[name] for name in ("random_states", "other_random_states")
    )
    assert len(second) == 1
    assert not torch.equal(first["torch"], second[0]["torch"])
    train(tmp_path / "parts", "--ckpt_path=last", "--trainer.max_steps=-1")
    assert difference(tmp_path / "whole", tmp_path / "parts") == 0


@pytest.mark.slow
def test_one_held_out_window_is_measured_once_by_two_processes(tmp_path: Path) -> None:
    flags = [*SMALL, "--data.val_fraction=0.001", "--trainer.max_epochs=1"]
    train(tmp_path / "one", *flags)
    train(tmp_path / "two", *flags, TWO)
    [(_, one)], [(_, two)] = (read_curves(tmp_path / name / RUN)["best/val_loss"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=2e-7)


# ---- launching


@pytest.mark.slow
def test_torchrun_needs_no_flags(tmp_path: Path) -> None:
    result = torchrun(tmp_path, *SMALL, "--trainer.max_steps=3")
    assert result.returncode == 0, result.stderr
    assert "2 processes share each batch" in result.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["version_0"]
    assert result.stdout.count("val/loss") == 1
    result = torchrun(tmp_path, *SMALL, "--trainer.devices=3")
    assert "error: trainer.devices=3 does not fit the 2 processes that torchrun started" in result.stderr


@pytest.mark.slow
def test_nodes_with_folders_of_their_own_train_one_run(tmp_path: Path) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    nodes = []
    for rank in (1, 0):
        folder = tmp_path / f"node_{rank}"
        folder.mkdir()
        argv = [*SMALL, "--trainer.max_epochs=2", "--trainer.num_nodes=2", "--trainer.devices=1"]
        nodes.append(start(folder, *argv, NODE_RANK=str(rank), **place))
    second, first = (node.process.communicate(timeout=300)[0] for node in nodes)
    assert [node.process.returncode for node in nodes] == [0, 0], second + first
    assert second == ""
    assert re.search(r"^val/loss .*best.ckpt", first, re.M)
    assert [path.name for path in tmp_path.glob("node_*/runs/*")] == ["version_0"]


def test_nodes_that_cannot_find_each_other_are_refused(workdir: Path, refused: Any) -> None:
    assert "num_nodes=2 needs MASTER_ADDR, MASTER_PORT, NODE_RANK" in refused(
        "--trainer.num_nodes=2", "--trainer.accelerator=cpu"
    )


@pytest.mark.slow
def test_other_data_on_one_node_is_refused_once(tmp_path: Path) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    argv = [*SMALL_FLAGS[1:-1], *QUIET, "--trainer.num_nodes=2", "--trainer.devices=1", "--model.vocab_size=256"]
    text = ["--data=TextData", "--data.path=text.txt"]
    nodes = []
    for rank in (0, 1):
        folder = tmp_path / f"node_{rank}"
        folder.mkdir()
        (folder / "text.txt").write_text(f"{rank} " * 500)
        nodes.append(start(folder, *argv, *text, NODE_RANK=str(rank), **place))
    said = "".join(node.process.communicate(timeout=300)[0] for node in nodes)
    assert 2 in [node.process.returncode for node in nodes]
    assert len(re.findall("^error: rank 1 has other data than rank 0: .*; give all nodes the same$", said, re.M)) == 1
    assert list(tmp_path.glob("node_*/runs/*")) == []


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        ("ddp_fork", "ddp_fork gives nothing back of what it trains: use ddp"),
        ("ddp_spawn", "ddp_spawn gives nothing back of what it trains: use ddp"),
        ("fsdp", "fsdp measures and clips the gradient of each shard alone: use fsdp2"),
        ("deepspeed", "deepspeed is not one that this project is right under: use auto, ddp or fsdp2"),
    ],
)
def test_a_strategy_that_cannot_be_right_is_refused_by_name(strategy: str, reason: str) -> None:
    assert refusal("--trainer.accelerator=cpu", f"--trainer.strategy={strategy}") == f"trainer.strategy={reason}"


@pytest.mark.slow
def test_a_setting_that_is_wrong_for_all_processes_is_refused_once(tmp_path: Path) -> None:
    for argv, words in (
        (["--data.batch_size=3"], "batch_size=3 windows cannot be shared equally by 2 devices"),
        (["--trainer.max_steps=0"], "no step was trained"),
    ):
        result = run_command(TRAIN, *SMALL, TWO, *argv, cwd=tmp_path)
        assert result.returncode == 2
        errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert words in errors[0]
        assert list(tmp_path.glob("runs/*")) == []


# ---- faults


def running(folder: Path, *argv: str) -> Run:
    """A run of two processes that has trained some steps."""
    callback = {"class_path": "stress.Trace", "init_args": {"seconds": 0.02}}
    config = json.dumps({"trainer": {"callbacks": [callback]}})
    run = start(
        folder, *SMALL, TWO, "--trainer.max_epochs=50", "--trainer.val_check_interval=3", "--config", config, *argv
    )
    wait_until(run, lambda: (folder / LAST).exists())
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "target"),
    [
        (signal.SIGUSR1, "last rank"),
        (signal.SIGKILL, "rank 0"),
        (signal.SIGKILL, "launcher"),
    ],
)
def test_a_signal_to_any_process_ends_all_with_one_message_and_a_sound_checkpoint(
    tmp_path: Path, signum: signal.Signals, target: str
) -> None:
    run = running(tmp_path)
    problems, _ = stop(run, signum, target, 2, is_torchrun=False)
    assert problems == []
    assert read_checkpoint(tmp_path / LAST)["global_step"] > 0


@pytest.mark.slow
def test_a_signal_while_the_processes_start_leaves_none(tmp_path: Path) -> None:
    run = start(tmp_path, *SMALL, TWO)
    wait_until(run, lambda: len(run.pids()) == 3)
    problems, _ = stop(run, signal.SIGTERM, "launcher", 2, is_torchrun=False, moment="starting")
    assert problems == []
    assert run.process.returncode == 143
    assert list(tmp_path.glob("runs/*")) == []


@pytest.mark.slow
def test_torchrun_starts_a_failed_run_again_where_it_was(tmp_path: Path) -> None:
    callback = {"class_path": "stress.Trace", "init_args": {"seconds": 0.02}}
    config = json.dumps({"trainer": {"callbacks": [callback]}})
    flags = [*SMALL, "--trainer.max_steps=30", "--trainer.val_check_interval=3", "--config", config]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--max_restarts=1", f"--master_port={free_port()}"]
    run = start(tmp_path, *flags, launcher=launcher)
    wait_until(run, lambda: (tmp_path / LAST).exists())
    run.send(signal.SIGKILL, "last rank", 2)
    said = run.process.communicate(timeout=300)[0]
    assert run.process.returncode == 0, said
    assert "the job was started again: it goes on in runs/version_0" in said
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["version_0"]
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "trace").touch()
    train(tmp_path / "whole", *flags)
    assert difference(tmp_path, tmp_path / "whole") < 1e-12


def test_a_process_says_for_whom_it_waits_and_how_many_are_missing(workdir: Path) -> None:
    code = (
        "import slm.run.processes as p\np.SECONDS_OF_SILENCE, p.SECONDS_OF_PATIENCE = 0.1, 1.0\n"
        "from slm.cli import main\nmain([])\n"
    )
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    result = run_command("-c", code, cwd=workdir, **place, **ranks)
    missing = "2 of 3 processes, rank 1, 2: each is started by the same command on its node"
    assert result.stderr.splitlines()[0] == f"waiting for {missing}"
    assert result.returncode == 2

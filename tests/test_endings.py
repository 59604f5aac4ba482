"""How commands end: exit statuses, signals, last lines."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import stress
import torch
from conftest import SMALL_FLAGS, UNSHOWN, slow_after_first
from stress import LAST, SETTINGS, default_signals, finish, first_command, start, step_of

from slm.command.exit_codes import ends_in_one_line
from slm.errors import NotWrittenError
from slm.run.callbacks import LastCheckpoint
from slm.run.checkpoint import read_checkpoint
from slm.run.control import Control
from slm.run.processes import Processes
from slm.run.resume import ExactResume
from slm.run.signals import Progress, Stopped
from slm.training.language_model import LanguageModel


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    with default_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield


def exit_status(ending: Callable[[], object]) -> object:
    with pytest.raises(SystemExit) as exit_info, ends_in_one_line():
        ending()
    return exit_info.value.code


def raising(error: BaseException) -> Callable[[], object]:
    def end() -> None:
        raise error

    return end


def as_lightning_ends_at_ctrl_c() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise SystemExit(1)  # noqa: B904 - as Lightning does


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        (raising(KeyboardInterrupt()), 130),
        (as_lightning_ends_at_ctrl_c, 130),
        (raising(Stopped(signal.SIGTERM, 5, Path("last.ckpt"))), 143),
        (raising(Stopped(signal.SIGINT, 0, None)), 130),
        (raising(SystemExit(3)), 3),
    ],
)
def test_every_ending_has_the_status_that_a_shell_expects(ending: Callable[[], object], status: int) -> None:
    assert exit_status(ending) == status


def test_what_stopped_a_run_is_said_with_the_way_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    exit_status(raising(Stopped(signal.SIGINT, 57, Path("runs/my run/last.ckpt"))))
    said = capsys.readouterr().err
    assert said.startswith("stopped by SIGINT at step 57, which is kept; go on with ")
    assert said.endswith(" --ckpt_path 'runs/my run/last.ckpt'\n")


def test_a_signal_while_a_checkpoint_is_read_is_not_taken_for_damage(
    slm: Callable[..., str], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = LAST.read_bytes()
    original = torch.load

    def signalled(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr("torch.load", signalled)
    with pytest.raises(SystemExit) as exit_info:
        slm("--ckpt_path=last", "--trainer.max_epochs=3")
    assert exit_info.value.code == 128 + signal.SIGTERM
    assert LAST.read_bytes() == before


def test_a_second_ctrl_c_does_not_wait() -> None:
    progress = Progress()
    progress.control.is_training = True
    progress.hear(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        progress.hear(signal.SIGINT, None)


def test_the_first_signal_counts_and_is_due_once() -> None:
    progress = Progress()
    progress.control.is_training = True
    for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
        progress.hear(signum, None)
    assert [progress.control.reach(), progress.control.reach()] == [signal.SIGTERM, None]


def wait(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    while not condition():
        assert process.poll() is None, "it ended before"
        time.sleep(0.001)


@pytest.mark.slow
def test_signals_that_come_while_it_saves_leave_a_sound_checkpoint(tmp_path: Path) -> None:
    process = start(tmp_path, *first_command(SETTINGS["30 MB"]), STRESS_SLOW_SAVES="1")
    wait(process, lambda: step_of(tmp_path) >= 8)
    os.killpg(process.pid, signal.SIGTERM)
    wait(process, lambda: bool(stress.leftovers(tmp_path)))
    for _ in range(3):
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.005)
    status, said = finish(process)
    assert status == 143, said
    assert "stopped by SIGTERM at step" in said
    assert f"--ckpt_path {LAST}" in said
    assert "Traceback" not in said
    assert read_checkpoint(tmp_path / LAST)["global_step"] == step_of(tmp_path)
    assert stress.leftovers(tmp_path) == []


SMALL = [*SMALL_FLAGS, *UNSHOWN, "--trainer.enable_progress_bar=false", "--data.batch_size=8"]


def signal_in(monkeypatch: pytest.MonkeyPatch, hook: str, kind: signal.Signals, step: int) -> None:
    """Let the model send its own process a signal, in a hook at a step."""
    original = getattr(LanguageModel, hook)

    def signalling(self: LanguageModel, *args: Any) -> Any:
        if self.trainer.global_step == step:
            os.kill(os.getpid(), kind)
        return original(self, *args)

    monkeypatch.setattr(LanguageModel, hook, signalling)


@pytest.mark.parametrize(
    ("kind", "status"), slow_after_first([(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
)
def test_a_signal_lets_the_step_be_finished_and_kept_in_a_resumed_run_too(
    slm: Callable[..., str], monkeypatch: pytest.MonkeyPatch, kind: signal.Signals, status: int
) -> None:
    for argv, step in (([*SMALL, "--trainer.num_sanity_val_steps=0"], 5), (["--ckpt_path=last"], 8)):
        signal_in(monkeypatch, "training_step", kind, step)
        with pytest.raises(SystemExit) as exit_info:
            slm(*argv)
        assert exit_info.value.code == status
        assert read_checkpoint(LAST)["position"]["batch"] == read_checkpoint(LAST)["global_step"] == step + 1


def test_a_signal_that_is_ignored_as_after_nohup_stays_ignored(
    slm: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_in(monkeypatch, "training_step", signal.SIGHUP, step=5)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        slm(*SMALL, "--trainer.max_steps=8")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert read_checkpoint(LAST)["global_step"] == 8


def test_a_save_that_fails_at_a_signal_is_an_error(
    slm: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise NotWrittenError(f"{path} cannot be written: No space left on device")

    signal_in(monkeypatch, "training_step", signal.SIGTERM, step=5)
    monkeypatch.setattr("slm.run.checkpoint_io.replace_file", full)
    with pytest.raises(SystemExit) as exit_info:
        slm(*SMALL)
    assert exit_info.value.code == 2
    [line] = capsys.readouterr().err.splitlines()[1:]
    assert line.startswith(f"error: {LAST} cannot be written")


@pytest.mark.slow
def test_an_exception_in_the_closing_validation_leaves_the_last_checkpoint_as_it_is(
    slm: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slm(*SMALL, "--trainer.max_epochs=1")
    kept = []
    original = LanguageModel.validation_step

    def failing(self: LanguageModel, *args: Any) -> None:
        if self.trainer.state.fn == "validate":
            kept.append(LAST.read_bytes())
            raise KeyError("a bug")
        original(self, *args)

    monkeypatch.setattr(LanguageModel, "validation_step", failing)
    with pytest.raises(KeyError):
        slm("--ckpt_path=last", "--trainer.max_epochs=2", "--model.learning_rate=1")  # which spoils it
    assert [LAST.read_bytes()] == kept
    assert read_checkpoint(LAST.with_name("best.ckpt"))["global_step"] < read_checkpoint(LAST)["global_step"]


def test_an_exception_says_what_is_kept(
    slm: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = LanguageModel.training_step

    def failing(self: LanguageModel, *args: Any) -> Any:
        if self.trainer.global_step == 4:
            raise KeyError("a bug")
        return original(self, *args)

    monkeypatch.setattr(LanguageModel, "training_step", failing)
    with pytest.raises(KeyError):
        slm(*SMALL)
    assert f"step 4 is kept in {LAST}" in capsys.readouterr().err
    assert read_checkpoint(LAST)["global_step"] == 4


def test_saving_by_the_clock_takes_a_hundredth_of_the_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keeper = LastCheckpoint(tmp_path, ExactResume(), Control(Processes()))
    for seconds, wait in ((0.1, 60.0), (2.0, 200.0)):
        times = iter([1000.0, 1000.0 + seconds])
        monkeypatch.setattr("slm.run.callbacks.time.monotonic", lambda times=times: next(times))
        keeper._save(SimpleNamespace(loggers=[], save_checkpoint=lambda *_, **__: None))  # type: ignore[arg-type]
        assert keeper._next_save == pytest.approx(1000.0 + seconds + wait)


@pytest.mark.parametrize(("kind", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_a_validation_does_not_wait_for_its_end(
    slm: Callable[..., str], monkeypatch: pytest.MonkeyPatch, kind: signal.Signals, status: int
) -> None:
    signal_in(monkeypatch, "validation_step", kind, step=5)
    with pytest.raises(SystemExit) as exit_info:
        slm(*SMALL, "--trainer.val_check_interval=5", "--data.val_fraction=0.5")
    assert exit_info.value.code == status
    position = read_checkpoint(LAST)["position"]
    assert (position["batch"], position["is_unvalidated"]) == (5, True)


@pytest.mark.parametrize("kind", slow_after_first([signal.SIGTERM, signal.SIGINT]))
def test_a_run_stopped_before_its_first_step_leaves_nothing(
    slm: Callable[..., str], workdir: Path, monkeypatch: pytest.MonkeyPatch, kind: signal.Signals
) -> None:
    for hook in ("validation_step", "on_validation_epoch_end", "on_train_start"):
        with monkeypatch.context() as patch:
            signal_in(patch, hook, kind, step=0)
            with pytest.raises(SystemExit) as exit_info:
                slm(*SMALL, "--data.val_fraction=0.5")
        assert exit_info.value.code == 128 + kind
        assert list((workdir / "runs").iterdir()) == [], hook


def test_a_ctrl_c_whose_answer_cannot_be_shown_still_stops_the_run(
    slm: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, data: bytes) -> int:
        raise OSError(5, "the terminal has gone")

    signal_in(monkeypatch, "training_step", signal.SIGINT, step=2)
    monkeypatch.setattr("slm.run.signals.os.write", fail)
    with pytest.raises(SystemExit) as exit_info:
        slm(*SMALL)
    assert exit_info.value.code == 130

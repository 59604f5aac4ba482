"""What cannot be printed: a message changes nothing, a result ends the command with status 1."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL_FLAGS, run_command, small_model

from slm.run.checkpoint import read_checkpoint

TRAIN = [str(ROOT / "train.py"), *SMALL_FLAGS, "--data.batch_size=8"]
LAST = Path("runs/version_0/checkpoints/last.ckpt")
FULL = Path("/dev/full")
pytestmark = pytest.mark.slow
needs_full = pytest.mark.skipif(not FULL.exists(), reason="the system has no disk that is always full")


def shell(command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A command line of a shell, in which PYTHON is this interpreter."""
    return run_command(
        "-c",
        "import os, sys; os.execvp('sh', ['sh', '-c', sys.argv[1]])",
        command,
        cwd=cwd,
        PYTHON=sys.executable,
        **env,
    )


def ending(body: str, redirection: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A command that does `body`, as every command of the project ends."""
    (cwd / "command.py").write_text(
        "import sys\nfrom slm.command.exit_codes import ends_in_one_line\nfrom slm.messages import say\n"
        f"from slm.command.streams import print_only_messages\nwith ends_in_one_line():\n    {body}\n"
    )
    return shell(f'{{ "$PYTHON" command.py {redirection}; }}', cwd, PYTHONPATH=str(ROOT), **env)


@needs_full
def test_a_result_that_a_full_disk_does_not_take_is_status_1_in_one_line(tmp_path: Path) -> None:
    result = ending("print('text')", "> /dev/full", tmp_path)
    line = "error: the output cannot be written: No space left on device\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", line)


def test_a_result_without_an_output_is_status_1_in_one_line(tmp_path: Path) -> None:
    result = ending("print('text')", ">&-", tmp_path)
    line = "error: the output cannot be written: Bad file descriptor\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", line)


def test_a_reader_that_has_gone_ends_a_command_as_it_does_every_other(tmp_path: Path) -> None:
    result = ending("[print(number) for number in range(10**6)]", "| head -n 1", tmp_path)
    assert (result.stdout, result.stderr) == ("0\n", "")
    result = ending("[print(number) for number in range(10**6)]", "; echo $? > status; } | head -n 1; { true", tmp_path)
    assert (tmp_path / "status").read_text() == "141\n"


def test_a_pipe_that_does_not_block_gets_all_of_a_result(tmp_path: Path) -> None:
    body = "os.set_blocking(1, False), [print(number) for number in range(10**5)]"
    result = ending(f"import os; {body}", "| (sleep 0.5; tail -n 1)", tmp_path)
    assert (result.stdout, result.stderr) == ("99999\n", "")


@needs_full
@pytest.mark.parametrize("redirection", ["> /dev/full 2> /dev/full", ">&- 2>&- <&-"])
def test_a_message_that_cannot_be_printed_changes_nothing(redirection: str, tmp_path: Path) -> None:
    body = "print_only_messages(), print('text'), say('text'), print('text', flush=True), open('done', 'w').close()"
    result = ending(body, redirection, tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert (tmp_path / "done").exists()


@needs_full
def test_a_mistake_keeps_its_status_where_it_cannot_be_said(tmp_path: Path) -> None:
    assert ending("raise __import__('slm').InputError('wrong')", "2> /dev/full", tmp_path).returncode == 2


def test_no_file_takes_the_place_of_a_stream_that_was_closed(tmp_path: Path) -> None:
    body = "print_only_messages(), print('text'), open('numbers', 'w').write(str(open('file', 'w').fileno()))"
    assert ending(body, ">&- <&-", tmp_path).returncode == 0
    assert int((tmp_path / "numbers").read_text()) > 2


def test_what_an_encoding_lacks_is_printed_as_an_escape(tmp_path: Path) -> None:
    result = ending("print('dätä'), say('dätä')", "", tmp_path, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout, result.stderr) == (0, "d\\xe4t\\xe4\n", "d\\xe4t\\xe4\n")


def test_training_without_an_output_ends_well(tmp_path: Path) -> None:
    assert shell(f'"$PYTHON" {" ".join(TRAIN)} --trainer.max_steps=3 >&- 2>&-', tmp_path).returncode == 0
    assert read_checkpoint(tmp_path / LAST)["global_step"] == 3


@needs_full
@pytest.mark.parametrize("flag", ["--help", "--print_config"])
def test_settings_that_cannot_be_printed_are_status_1(flag: str, tmp_path: Path) -> None:
    result = shell(f'"$PYTHON" {ROOT / "train.py"} {flag} > /dev/full', tmp_path)
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)


@needs_full
def test_text_that_cannot_be_printed_is_status_1(tmp_path: Path) -> None:
    model = small_model()
    content = {"hyper_parameters": dict(model.hparams), "tokenizer": None}
    torch.save({**content, "state_dict": model.transformer.state_dict()}, tmp_path / "weights.pt")
    result = shell(
        '"$PYTHON" -m slm.generate --ckpt_path weights.pt --prompt 3 > /dev/full', tmp_path, PYTHONPATH=str(ROOT)
    )
    assert (result.returncode, result.stderr) == (1, "error: the output cannot be written: No space left on device\n")


def in_a_terminal_that_is_closed(argv: list[str], cwd: Path, sees: bytes, hangup: str) -> int:
    """The exit status of a process whose terminal is closed once it has shown this; `hangup` is how it takes SIGHUP."""
    master, terminal = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # else the bar has no room
    code = (
        "import fcntl, os, signal, sys, termios\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        f"signal.signal(signal.SIGHUP, signal.{hangup})\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    try:
        shown = b""
        while sees not in shown:
            assert select.select([master], [], [], 280)[0], shown
            shown += os.read(master, 2**16)
        os.close(master)
        return process.wait(timeout=280)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("hangup", "max_epochs", "status"), [("SIG_DFL", 10**6, 128 + signal.SIGHUP), ("SIG_IGN", 3, 0)]
)
def test_a_terminal_that_is_closed_stops_a_run_unless_it_ignores_that(
    hangup: str, max_epochs: int, status: int, tmp_path: Path
) -> None:
    argv = [*TRAIN, f"--trainer.max_epochs={max_epochs}"]
    assert in_a_terminal_that_is_closed(argv, tmp_path, b"Epoch 1", hangup) == status
    kept = read_checkpoint(tmp_path / LAST)
    assert kept["global_step"] > 0
    assert (kept["epoch"] == 3) == (status == 0)

"""`~` in a path is the home folder, in every command, whether a flag or a file of settings names it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL_FLAGS, slow_after_first

from slm import export, generate, runs
from slm.cli import main
from slm.run.loading import load

Run = Callable[..., str]
SMALL = [*SMALL_FLAGS, "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]
SMALL_TEXT = [*(flag for flag in SMALL if "num_tokens" not in flag and "vocab" not in flag), "--model.vocab_size=256"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder beside an empty current directory."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize(
    "given",
    slow_after_first(
        ["--trainer.default_root_dir=~/out", "--config={trainer: {default_root_dir: ~/out}}", "--config=~/f.yaml"]
    ),
)
def test_a_run_is_whole_in_the_folder_that_is_asked_for(
    given: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "f.yaml").write_text("trainer:\n  default_root_dir: ~/out\n")
    main([*SMALL, given])
    run = home / "out/runs/version_0"
    files = {path.name for path in run.rglob("*")}
    assert {"config.yaml", "last.ckpt", "best.ckpt", "loss.png"} <= files
    assert list(Path().iterdir()) == []
    assert f"--ckpt_path {run}/checkpoints/last.ckpt" in capsys.readouterr().out


@pytest.mark.slow
def test_every_command_finds_what_lies_in_the_home_folder(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    text = "one two three " * 200
    (home / "a.txt").write_text(text)
    (home / "prompt.txt").write_text("one")
    main([*SMALL_TEXT, "--data=TextData", "--data.path=~/a.txt", "--data.val_path=~/a.txt", "--trainer.max_steps=2"])
    shutil.move("runs", home / "runs")
    main(["validate", "--ckpt_path=~/runs/version_0"])
    assert load("~/runs/version_0").hparams["vocab_size"] == 256
    generate.main(["--ckpt_path=~/runs/version_0", "--prompt_file=~/prompt.txt", "--max_new_tokens=2"])
    runs.main(["--runs=~/runs"])
    assert "version_0" in capsys.readouterr().out
    export.main(["--ckpt_path=~/runs/version_0", "--output=~/exported"])
    export.main(["--from_hf=~/exported", "--output=~/imported.pt"])
    main([*SMALL_TEXT, "--init_from=~/imported.pt", "--data.path=~/a.txt", "--trainer.default_root_dir=~/again"])
    assert (home / "again/runs/version_0/checkpoints/last.ckpt").is_file()
    assert list(Path().iterdir()) == []


def test_a_tilde_without_a_home_folder_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as it does for a user without a name
    with pytest.raises(SystemExit):
        main([*SMALL, "--trainer.default_root_dir=~/out"])
    assert "default_root_dir=~/out: there is no home folder that ~ stands for" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_a_name_that_only_begins_with_a_tilde_is_that_name(home: Path) -> None:
    Path("~a.txt").write_text("one two three " * 200)
    main([*SMALL_TEXT, "--data=TextData", "--data.path=~a.txt", "--trainer.max_steps=1"])


def test_without_a_home_folder_the_cache_has_to_be_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    Path("a.txt").write_text("one two three " * 200)
    argv = [*SMALL_TEXT, "--data=TextData", "--data.path=a.txt", "--trainer.max_steps=1"]
    with pytest.raises(SystemExit):
        main(argv)
    assert "there is no home folder for prepared texts: set XDG_CACHE_HOME" in capsys.readouterr().err
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    main(argv)
    assert list(Path("cache/slm").glob("*.tokens"))

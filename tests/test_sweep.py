"""Many runs from one command line: each point is trained once, goes on exactly, and is an ordinary run."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import SMALL_FLAGS, UNSHOWN, run_command

from slm.cli import main as train
from slm.errors import InputError
from slm.research.points import Points, grid, split
from slm.research.runs import read_run
from slm.research.search import Range, as_range
from slm.run.checkpoint import read_checkpoint
from slm.run.folder import hold
from slm.sweep import main

SMALL = [*SMALL_FLAGS, *UNSHOWN, "--trainer.accelerator=cpu", "--trainer.precision=32-true"]
RUNS = Path("runs")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run / "checkpoints/last.ckpt")["state_dict"]


def start(*argv: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "slm.sweep", *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def wait_until_let_go(run: Path) -> None:
    """Wait until no process trains a run, for a minute at most."""
    for _ in range(1200):
        with contextlib.suppress(InputError):
            hold(run).close()
            return
        time.sleep(0.05)
    raise AssertionError(f"{run} is still trained")


def told(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
    return capsys.readouterr().err


def test_a_flag_with_several_values_is_an_axis() -> None:
    flags = split(["--a", "1", "2", "--b=x y", "--flag", "--c=-1", "--d", "5", "7", "--e", "-3"])
    points = grid(flags)
    assert [point.varied for point in points] == [(a, d) for a in ("--a=1", "--a=2") for d in ("--d=5", "--d=7")]
    assert points[1].argv == ("--a=1", "--b=x y", "--flag", "--c=-1", "--d=7", "--e=-3")


def test_a_point_is_known_by_its_settings_not_by_the_order_of_its_flags(workdir: Path) -> None:
    points = Points(RUNS)

    def key(*argv: str) -> str:
        [point] = grid(split([*SMALL, *argv]))
        return points.key(point)

    assert key("--data.seed=3", "--model.num_layers=2") == key("--model.num_layers=2", "--data.seed=3")
    assert key("--trainer.enable_progress_bar=false", "--trainer.default_root_dir=elsewhere") == key()
    assert len({key(), key("--seed_everything=1"), key("--data.seed=1"), key("--model.learning_rate=0.1")}) == 4


def test_a_range_is_whole_or_not_and_logarithmic_if_it_is_wide() -> None:
    assert as_range(["2..8"]) == Range(2, 8, is_whole=True)
    assert as_range(["1e-4..0.1"]) == Range(1e-4, 0.1, is_whole=False)
    is_logarithmic = {text: as_range([text]).is_logarithmic for text in ("0.1..0.2", "1e-4..0.1", "0.0..0.5")}  # type: ignore[union-attr]
    assert is_logarithmic == {"0.1..0.2": False, "1e-4..0.1": True, "0.0..0.5": False}
    assert [as_range(values) for values in (["1..2", "x"], ["a..b"], ["../text.txt"], [])] == [None] * 4
    with pytest.raises(InputError, match="the lower end of a range comes first"):
        as_range(["3..2"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fit", "--model.embed_dim", "16", "32"], "fit: a sweep trains, give it the flags of train.py alone"),
        (["--ckpt_path=last"], "--ckpt_path: only new runs are trained here, leave it out"),
        (["--model.embed_dim", "16", "31"], "embed_dim=31 is not divisible by num_heads="),
        (["--model.embed_dims", "16", "32"], "unknown setting model.embed_dims"),
        (["--model.learning_rate", "0.001", "0.001"], "--model.learning_rate 0.001: it is given twice, leave one out"),
        (["--trainer.default_root_dir", "a", "b"], "--trainer.default_root_dir a b: it changes nothing in what a run"),
        (["--seed_everything", "0..9"], "--seed_everything 0..9: a seed has no range, give seeds one by one"),
        (["--pruner=NopPruner"], "pruner=NopPruner: only a search has one, add --trials N"),
        (["--model.learning_rate", "0.001..0.1"], "only a search chooses in a range, add --trials N"),
        (["--trials=0"], "trials=0 must be at least 1"),
        (["--trials=3"], "nothing is searched"),
        (["--trials=3", "--data.seed", "0..9"], "--data.seed 0..9: a seed has no range"),
        (["--trials=3", "--data.seed", "0", "1"], "--data.seed: the best of a search in it would be the luckiest"),
        (
            ["--trials=3", "--model.num_layers", "1..3", "--sampler=BruteForceSampler"],
            "sampler=BruteForceSampler: give",
        ),
        (["--trials=3", "--model.num_layers", "1..3", "--sampler=Best"], "sampler=Best: give one of"),
        (
            ["--trials=3", "--model.num_layers", "1..3", "--sampler=GridSampler", "--dry_run"],
            "sampler=GridSampler: give",
        ),
        (
            ["--trials=3", "--model.num_layers", "1..3", "--pruner=ThresholdPruner"],
            "pruner=ThresholdPruner: give one of",
        ),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_trained(
    argv: list[str], message: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--trials=3" in argv:
        pytest.importorskip("optuna")
    [line] = told([*SMALL, *argv] if argv[0] != "fit" else argv, capsys).splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not list(RUNS.glob("version_*"))


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_bits_of_runs_that_were_never_stopped(workdir: Path) -> None:
    argv = [*SMALL, "--trainer.max_epochs=120", "--seed_everything", "3", "4"]
    kept = RUNS / "version_0/checkpoints/last.ckpt"
    for signum, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        sweep = start(*argv)
        before = kept.stat().st_mtime_ns if kept.is_file() else 0
        wait_for(lambda before=before: kept.is_file() and kept.stat().st_mtime_ns > before, sweep)
        sweep.send_signal(signum)
        _, said = sweep.communicate()
        assert sweep.returncode == status
        assert said.endswith("the same command goes on\n")
        assert "Traceback" not in said
    assert read_checkpoint(kept)["global_step"] < 120 * 4, "it was over before it was stopped: give it more epochs"
    assert run_command("-m", "slm.sweep", *argv, cwd=workdir).returncode == 0
    for number, seed in enumerate((3, 4)):
        run_command(
            "-m", "slm.cli", *argv[:-3], f"--seed_everything={seed}", "--trainer.default_root_dir=whole", cwd=workdir
        )
        swept, whole = weights(RUNS / f"version_{number}"), weights(Path(f"whole/runs/version_{number}"))
        assert all(torch.equal(value, swept[name]) for name, value in whole.items())
    assert {path.name for path in RUNS.iterdir()} == {"sweep", "version_0", "version_1"}


@pytest.mark.slow
def test_two_processes_share_a_sweep_and_a_finished_point_is_not_trained_again(workdir: Path) -> None:
    argv = [*SMALL, "--trainer.max_epochs=2", "--model.learning_rate", "0.001", "0.01", "0.1"]
    both = [start(*argv) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    trained = re.findall(r"^\d of 3: --model.learning_rate=(\S+)$", "".join(err for _, err in said), re.MULTILINE)
    assert sorted(trained) == ["0.001", "0.01", "0.1"]
    for out, _ in said:
        assert len(re.findall(r"^\| version_\d", out, re.MULTILINE)) == 3
    rates = {read_run(run).settings["model.learning_rate"] for run in RUNS.glob("version_*")}
    assert rates == {0.001, 0.01, 0.1}
    again = run_command("-m", "slm.sweep", *argv, cwd=workdir)
    assert again.returncode == 0
    assert " of 3: " not in again.stderr
    assert again.stdout in [out for out, _ in said]


@pytest.mark.slow
def test_a_run_ends_with_its_sweep_and_what_another_process_trains_is_waited_for(workdir: Path) -> None:
    argv = [*SMALL, "--trainer.max_epochs=120", "--trainer.devices=2", "--seed_everything=3"]
    first = start(*argv)
    wait_for(lambda: (RUNS / "version_0/checkpoints/last.ckpt").is_file(), first)
    first.kill()
    first.communicate()
    wait_until_let_go(RUNS / "version_0")
    assert read_checkpoint(RUNS / "version_0/checkpoints/last.ckpt")["global_step"] < 120 * 4
    with hold(RUNS / "version_0"):
        second = start(*argv)
        assert second.stderr is not None
        assert "waiting for other processes, which train 1 of 1" in second.stderr.readline()
    _, said = second.communicate()
    assert second.returncode == 0, said
    assert [path.name for path in RUNS.glob("version_*")] == ["version_0"]


@pytest.mark.slow
def test_a_point_that_fails_leaves_the_others_and_the_exit_status_says_so(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*SMALL, "--trainer.max_epochs=1", "--model.optimizer=sgd", "--trainer.gradient_clip_val=null"]
    said = told([*argv, "--model.learning_rate", "1e30", "0.01"], capsys)
    assert re.search(r"failed: step \d: .* is not finite", said)
    assert "error: 1 of its runs failed" in said
    assert len(list((RUNS / "sweep").glob("*.json"))) == 1


@pytest.mark.slow
def test_a_search_takes_the_mean_over_seeds_and_goes_on_where_it_was_stopped(workdir: Path) -> None:
    optuna = pytest.importorskip("optuna")
    argv = [*SMALL, "--trainer.max_epochs=120", "--pruner=NopPruner", "--sampler=RandomSampler"]
    argv += ["--model.learning_rate", "0.001..0.1", "--model.num_layers", "1..2", "--seed_everything", "0", "1"]
    first = start(*argv, "--trials=2")
    wait_for(lambda: (RUNS / "version_2/checkpoints/last.ckpt").is_file(), first)
    first.kill()
    first.communicate()
    wait_until_let_go(RUNS / "version_2")  # its child ends too, long before 120 epochs
    assert read_checkpoint(RUNS / "version_2/checkpoints/last.ckpt")["global_step"] < 120 * 4
    assert run_command("-m", "slm.sweep", *argv, "--trials=2", cwd=workdir).returncode == 0
    assert run_command("-m", "slm.sweep", *argv, "--trials=3", cwd=workdir).returncode == 0
    storage = optuna.storages.journal.JournalFileBackend("runs/sweep/study.journal")
    [study] = optuna.get_all_study_summaries(optuna.storages.JournalStorage(storage))
    trials = optuna.load_study(
        study_name=study.study_name, storage=optuna.storages.JournalStorage(storage)
    ).get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    losses: dict[tuple[float, int], list[float]] = {}
    for run in map(read_run, RUNS.glob("version_*")):
        point = run.settings["model.learning_rate"], run.settings["model.num_layers"]
        losses.setdefault(point, []).append(run.best("val/loss"))
    assert len(list(RUNS.glob("version_*"))) == 6
    for trial in trials:
        at = float(format(trial.params["--model.learning_rate"], ".6g")), trial.params["--model.num_layers"]
        assert len(losses[at]) == 2
        assert trial.value == pytest.approx(sum(losses[at]) / 2)


@pytest.mark.slow
def test_a_search_that_failed_says_so_and_tries_others_in_the_place_of_what_failed(workdir: Path) -> None:
    pytest.importorskip("optuna")
    [text, *others] = ["--data.path=text.txt", "--data=TextData", "--model.vocab_size=256", "--trainer.max_epochs=1"]
    argv = ["-m", "slm.sweep", *SMALL[:-1], *others, text, "--trials=2", "--model.learning_rate", "0.001..0.1"]
    argv = [flag for flag in argv if not flag.startswith("--data.num_tokens")]
    failed = run_command(*argv, cwd=workdir)
    assert failed.returncode == 2
    assert "there is no such file" in failed.stderr
    Path("text.txt").write_text("one two three four five. " * 200)
    mended = run_command(*argv, cwd=workdir)
    assert mended.returncode == 0, mended.stderr
    assert len(re.findall(r"^\| version_\d", mended.stdout, re.MULTILINE)) == 2


@pytest.mark.slow
def test_changed_data_or_another_run_in_its_place_makes_a_point_new(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [flag for flag in SMALL if not flag.startswith("--data.num_tokens")]
    argv += ["--data=TextData", "--data.path=text.txt", "--model.vocab_size=256", "--trainer.max_epochs=1"]
    Path("text.txt").write_text("one two three four five. " * 200)
    main(argv)
    Path("text.txt").write_text("five four three two one. " * 300)
    capsys.readouterr()
    main(argv)
    assert "1 of 1: " in capsys.readouterr().err
    (RUNS / "version_1").rename("elsewhere")
    shutil.copytree(RUNS / "version_0", RUNS / "version_1")
    main(argv)
    assert "runs/version_2: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_search_gives_up_what_is_not_promising(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    argv = [*SMALL, "--trainer.max_epochs=400", "--pruner=PercentilePruner"]
    with pytest.raises(SystemExit):
        main([*argv, "--trials=2", "--model.num_layers", "1..3"])
    assert "pruner=PercentilePruner: give one of" in capsys.readouterr().err
    code = (
        "import optuna\nfrom slm.sweep import main\n"
        "class Never(optuna.pruners.BasePruner):\n"
        "    def prune(self, study, trial): return trial.number == 1\n"
        "optuna.pruners.NeverPruner = Never\n"
        f"main({[*argv[:-1], '--trials=2', '--pruner=NeverPruner', '--model.learning_rate', '0.001..0.1']!r})\n"
    )
    result = run_command("-c", code, cwd=workdir)
    assert result.returncode == 0, result.stderr
    assert "trial 2 is given up, it is not promising" in result.stderr
    assert "trials trained to their end: 1, given up: 1; the best: --model.learning_rate=0." in result.stderr
    kept = read_checkpoint(RUNS / "version_1/checkpoints/last.ckpt")["global_step"]
    assert 0 < kept < read_checkpoint(RUNS / "version_0/checkpoints/last.ckpt")["global_step"]
    assert len(list((RUNS / "sweep").glob("*.json"))) == 1


@pytest.mark.slow
def test_the_cost_is_said_and_nothing_is_trained(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*SMALL, "--trainer.max_epochs=3", "--model.hidden_dim", "16", "32", "--seed_everything", "0", "1"]
    main([*argv, "--dry_run"])
    header, _, first, second, _, total = capsys.readouterr().out.splitlines()
    assert header.startswith("| runs | ")
    for row, hidden_dim in ((first, 16), (second, 32)):
        runs, point, parameters, steps, *_ = (cell.strip() for cell in row.strip("|").split("|"))
        [point_] = grid(split([*SMALL, f"--model.hidden_dim={hidden_dim}"]))
        model = point_.command().new_model(on_meta=True)
        assert (runs, point) == ("2", f"--model.hidden_dim={hidden_dim} --seed_everything=0")
        assert parameters == f"{sum(p.numel() for p in model.transformer.parameters()):,}"
        assert int(steps) == 3 * 4
    assert total.startswith("4 runs: 0:")
    assert not RUNS.exists()
    main([*argv[:-2], "0"])  # one of the seeds
    capsys.readouterr()
    main([*argv, "--dry_run"])
    *_, total = capsys.readouterr().out.splitlines()
    assert total.startswith("2 runs: 0:")
    assert total.endswith(", 2 others have ended")


def test_a_named_job_goes_on_in_its_run_even_if_that_kept_nothing(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLM_JOB", "mine")
    argv = [*SMALL, "--trainer.enable_progress_bar=false", "--trainer.max_steps=2"]
    train(argv)
    (RUNS / "version_0/checkpoints/last.ckpt").unlink()
    train(argv)
    assert "the job was started again: it goes on in runs/version_0" in capsys.readouterr().err
    monkeypatch.setenv("SLM_JOB", "another")
    train(argv)
    assert {path.name for path in RUNS.iterdir()} == {"version_0", "version_1"}

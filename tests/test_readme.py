"""Every command in the README is parsed and run here; the two that set an environment up are run by `.ci/run`."""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, run_command

import slm as package
from slm.cli import main
from slm.generate import main as write_text

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S) for line in block.splitlines()]
SETUP = [line for line in COMMANDS if line.startswith("python3 -m venv")]
TRAIN = [line for line in COMMANDS if line.startswith("python train.py")]
OTHER = [line for line in COMMANDS if line not in SETUP + TRAIN]
STRESS = "python -m tests.stress"
BENCHMARK = "python -m slm.benchmark"
SWEEPS = [line for line in OTHER if line.startswith(f"{BENCHMARK} --sweep ")]
SHORTER = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]
SMALLER = [
    "--model.embed_dim=16",
    "--model.num_heads=4",
    "--model.hidden_dim=32",
    "--model.num_layers=1",
    "--model.max_seq_len=32",
]
GENERATE = 'python -m slm.generate --ckpt_path best --prompt "The "'
RECIPES = ("small_text", "text_2min", "text_10min", "text_60min")


def test_each_command_is_of_a_kind_that_is_run() -> None:
    assert len(SETUP) == 2
    assert len(TRAIN) >= 8
    assert OTHER[0] == "source .venv/bin/activate"
    assert OTHER[1] == "tensorboard --logdir runs"
    assert OTHER[2:-1] == [STRESS, GENERATE, BENCHMARK, *SWEEPS]
    assert OTHER[-1].startswith("python -c ")


def test_the_ci_runs_the_very_set_up_lines() -> None:
    script = (ROOT / ".ci/run").read_text()
    patterns = re.findall(r"grep -m1 '(.+?)' README\.md", script)
    assert [next(line for line in README.splitlines() if re.search(pattern, line)) for pattern in patterns] == SETUP


def test_the_commands_run_one_after_another(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(ROOT / "README.md", workdir)
    for name in ("configs", "slm"):
        (workdir / name).symlink_to(ROOT / name)
    first = SETUP[0].partition("train.py ")[2]
    main([*shlex.split(first), *SHORTER, *SMALLER])
    for line in COMMANDS:
        if line == GENERATE:
            capsys.readouterr()
            write_text(shlex.split(line)[3:])
            assert capsys.readouterr().out.startswith("The ")
        if line not in TRAIN:
            continue
        argv = shlex.split(line, comments=True)[2:]
        if "needs a GPU" in line:
            with pytest.raises(SystemExit):
                main([*argv, "--print_config"])
            continue
        evaluates = argv[0] in ("validate", "test", "predict")
        resumes = "--ckpt_path" in argv
        is_long = any(f"configs/{name}.yaml" in argv for name in RECIPES)
        shorter = [*SHORTER, *(["--trainer.max_steps=2"] if is_long else [])]
        main([*argv, *([] if evaluates else shorter), *([] if resumes else SMALLER)])
    assert {path.name for path in Path("runs").iterdir()} == {f"version_{number}" for number in range(10)}
    tensorboard = shlex.split(OTHER[1])
    result = run_command("-m", "tensorboard.main", *tensorboard[1:], "--inspect", cwd=workdir)
    assert "train/loss" in result.stdout or "val/loss" in result.stdout, result.stderr


def test_the_python_example_runs(slm: Callable[..., str]) -> None:
    slm("--trainer.max_epochs=1", *SHORTER, *SMALLER)
    [example] = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    names: dict[str, package.LanguageModel] = {}
    exec(example, names)
    assert not names["model"].training


def test_runs_are_stopped_and_resumed_with_the_same_bits_as_the_command_beside_the_table_shows() -> None:
    result = run_command(*shlex.split(STRESS)[1:], "--trials", "3", cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = re.findall(r"^\| (.+?) \| (\d+) \| (\d+) \| (\d+) \|", result.stdout, re.M)
    assert len(rows) >= 5
    stated = re.findall(r"^\| (.+?) \| (\d+) \| (\d+) \| (\d+) \|", README, re.M)
    assert {name for name, *_ in rows} <= {name for name, *_ in stated}


def test_the_entropies_quoted_are_those_that_the_command_beside_them_prints(workdir: Path) -> None:
    printed = run_command(*shlex.split(OTHER[-1])[1:], cwd=workdir).stdout.split()
    [quoted] = re.findall(r"allows a loss of ([\d.]+), the last two ([\d.]+)", README.replace("\n", " "))
    assert [f"{float(value):.2f}" for value in printed] == list(quoted)


def test_the_benchmark_compares_with_its_bare_loop_and_the_teaching_script(workdir: Path) -> None:
    tiny = ["--model.vocab_size=64", "--data.num_tokens=20000", *SMALLER]
    result = run_command(*shlex.split(BENCHMARK)[1:], *tiny, cwd=workdir)
    assert result.returncode == 0, result.stderr
    figures = r"^\| (.+?) \| [\d.]+ \([\d.]+ to [\d.]+\) \| [\d,]+ \| \d+% \| [\d.]+ GB \| ([\d.]+) \|$"
    rows = dict(re.findall(figures, result.stdout, re.M))
    stated = [name for name, _ in re.findall(figures, README, re.M)]
    assert list(rows)[:3] == stated[:3] == ["slm", "its bare loop", "teaching script"]
    assert rows["slm"] == "1.00"
    assert "A step is 0.0 GFLOP" in result.stdout
    assert list(workdir.iterdir()) == []


def test_a_sweep_measures_the_command_at_each_value(workdir: Path) -> None:
    swept = [shlex.split(line)[4] for line in SWEEPS]
    assert swept == ["model.vocab_size", "model.max_seq_len", "model.embed_dim", "model.num_layers"]
    result = run_command(
        *shlex.split(SWEEPS[0])[1:4], swept[0], "64,128", *SMALLER, "--data.num_tokens=9000", cwd=workdir
    )
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^\| (\d+) \| \d+ \| [\d.]+ \| \d+% \| [\d.]+ GB \|$", result.stdout, re.M) == ["64", "128"]


def test_the_defaults_in_the_table_are_those_in_force() -> None:
    result = run_command(str(ROOT / "train.py"), "--print_config", cwd=ROOT)
    stated = {}
    for flags, values in re.findall(r"^\| (`--.+?`) \| (.+?) \|", README, re.M):
        names = re.findall(r"`--([\w.]+)`", flags)
        defaults = [value.strip() for value in values.split(",")]
        stated |= dict(zip(names, defaults if len(defaults) == len(names) else defaults * len(names), strict=True))
    assert len(stated) > 15
    for name, value in stated.items():
        key = name.rpartition(".")[2]
        [actual] = re.findall(rf"^ +{key}: (.+)$", result.stdout, re.M)
        assert actual == value.replace("none", "null"), name

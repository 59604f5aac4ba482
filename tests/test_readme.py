"""Every command in the README is parsed and run here; the two that set an environment up are run by `.ci/run`."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, llama_folder, run_command

import slm as package
from slm import export, generate, generate_benchmark, runs
from slm.cli import main

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S) for line in block.splitlines()]
SETUP = [line for line in COMMANDS if line.startswith("python3 -m venv")]
TRAIN = [line for line in COMMANDS if line.startswith("python train.py")]
OTHER = [line for line in COMMANDS if line not in SETUP + TRAIN]
MY_MODEL, PYTHON_EXAMPLE = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
[ENTROPIES] = [line for line in OTHER if line.startswith("python -c ")]
STRESS = "python -m tests.stress"
STRESS_PROCESSES = f"{STRESS} --processes 2"
PROCESSES_COST = "python -m tests.processes_cost"
SHARED_CORES = "python -m tests.shared_cores"
GPU_REPORT = "python -m tests.gpu_report  # needs a GPU"
FAMILIES = "python -m tests.families --config configs/text.yaml"
[SCALING] = [line for line in OTHER if line.startswith("python -m slm.scaling ")]  # run by test_scaling.py
LOOK = "python -m slm.look --ckpt_path best"
[DOWNLOAD] = [line for line in OTHER if line.startswith("hf download ")]
[TORCHRUN] = [line for line in OTHER if line.startswith("torchrun ")]
BENCHMARK = "python -m slm.benchmark"
BENCHMARK_SWEEPS = [line for line in OTHER if line.startswith(f"{BENCHMARK} --sweep ")]
SWEEPS = [line for line in OTHER if line.startswith("python -m slm.sweep ")]
SHORTER = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]
TWO_STEPS = ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--model.short_context_steps=1"]
SMALLER = [
    "--model.embed_dim=16",
    "--model.num_heads=4",
    "--model.hidden_dim=32",
    "--model.num_layers=1",
    "--model.max_seq_len=32",
]
GENERATE_BENCHMARK = "python -m slm.generate_benchmark"
MODULES = {f"python -m slm.{module.__name__.rpartition('.')[2]}": module for module in (generate, runs, export)}
RECIPES = ("small_text", "record", "text_2min", "text_10min", "text_60min")


def module_of(line: str) -> ModuleType | None:
    return MODULES.get(" ".join(line.split()[:3]))


def test_each_command_is_of_a_kind_that_is_run() -> None:
    assert len(SETUP) == 2
    assert len(TRAIN) >= 8
    assert OTHER[0] == "source .venv/bin/activate"
    assert OTHER[1] == "tensorboard --logdir runs"
    run_in_order = [line for line in OTHER if module_of(line) is not None]
    assert len(run_in_order) >= 6
    left = [line for line in OTHER[2:] if line not in run_in_order]
    of_processes = [TORCHRUN, STRESS_PROCESSES, PROCESSES_COST]
    assert len(SWEEPS) == 2
    assert left == [
        FAMILIES,
        ENTROPIES,
        *SWEEPS,
        SCALING,
        STRESS,
        *of_processes,
        GENERATE_BENCHMARK,
        LOOK,
        DOWNLOAD,
        BENCHMARK,
        *BENCHMARK_SWEEPS,
        SHARED_CORES,
        GPU_REPORT,
    ]
    assert DOWNLOAD.endswith("  # needs a network")


def test_it_is_short_enough_to_be_read() -> None:
    assert len(README.splitlines()) <= 425


def test_the_files_and_sections_that_it_names_are_there() -> None:
    files = re.findall(r"`((?:slm|tests|configs)/[\w./]*|\.ci/run|train\.py)`", README)
    assert len(files) > 15
    assert [name for name in files if not (ROOT / name).exists()] == []
    sections = {title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", README, re.M)}
    links = re.findall(r"\]\(#(.+?)\)", README)
    assert len(links) > 5
    assert {*links} <= sections


def test_the_evenings_reading_begins_at_the_command_and_ends_with_the_data() -> None:
    rows = re.findall(r"^\| `([\w/.]+\.py)`.* \| .+\? \|$", README, re.M)
    assert (rows[0], rows[-1]) == ("train.py", "slm/data/dummy.py")
    wings = [name.split("/")[1] for name in rows[2:]]
    assert set(wings) == {"model", "training", "data"}  # nothing about files, signals or pictures is met
    names = {path.name for path in (ROOT / "slm/model").glob("[a-z]*.py")}
    assert names <= {Path(name).name for name in rows}


def test_the_ci_runs_the_very_set_up_lines() -> None:
    script = (ROOT / ".ci/run").read_text()
    patterns = re.findall(r"grep -m1 '(.+?)' README\.md", script)
    assert [next(line for line in README.splitlines() if re.search(pattern, line)) for pattern in patterns] == SETUP


def test_the_ci_runs_the_slow_tests_too_in_the_way_that_the_readme_tells() -> None:
    [flags] = re.findall(r'^eval "\$tests (.+)"$', (ROOT / ".ci/run").read_text(), re.M)
    assert shlex.split(flags.replace('\\"', '"')) == ["-m", "slow or not slow"]
    assert '`-m "slow or not slow"`' in README


@pytest.mark.slow
def test_the_commands_run_one_after_another(
    workdir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(ROOT / "README.md", workdir)
    (workdir / "my_model.py").write_text(MY_MODEL)
    monkeypatch.syspath_prepend(str(workdir))  # as Python does for the folder of `train.py`
    for name in ("configs", "slm"):
        (workdir / name).symlink_to(ROOT / name)
    llama_folder("smollm2")  # as if it was downloaded
    first = SETUP[0].partition("train.py ")[2]
    main([*shlex.split(first), *SHORTER, *SMALLER])
    for line in COMMANDS:
        if (module := module_of(line)) is not None:
            capsys.readouterr()
            module.main(shlex.split(line, comments=True)[3:])
            printed = capsys.readouterr().out
            assert printed.startswith({generate: "The ", runs: "| run"}.get(module, ""))
            assert module is not runs or "model=MyModel" in printed
        if line not in TRAIN:
            continue
        argv = shlex.split(line, comments=True)[2:]
        if "needs a GPU" in line:
            with pytest.raises(SystemExit):
                main([*argv, "--print_config"])
            continue
        evaluates = argv[0] in ("validate", "test", "predict")
        resumes = bool({"--ckpt_path", "--init_from"} & {*argv})
        is_long = any(f"configs/{name}.yaml" in argv for name in RECIPES)
        shorter = [*SHORTER, *(TWO_STEPS if is_long else [])]
        main([*argv, *([] if evaluates else shorter), *([] if resumes else SMALLER)])
    assert {path.name for path in Path("runs").iterdir()} == {f"version_{number}" for number in range(15)}
    assert Path("exported/model.safetensors").is_file()
    tensorboard = shlex.split(OTHER[1])
    result = run_command("-m", "tensorboard.main", *tensorboard[1:], "--inspect", cwd=workdir)
    assert "train/loss" in result.stdout or "val/loss" in result.stdout, result.stderr


@pytest.mark.slow
def test_the_python_example_runs(slm: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    slm("--config", str(ROOT / "configs/text.yaml"), "--trainer.max_epochs=1", *SHORTER, *SMALLER)
    names: dict[str, package.LanguageModel] = {}
    exec(PYTHON_EXAMPLE, names)
    assert capsys.readouterr().out.startswith("The ")
    assert not names["model"].training


@pytest.mark.slow
def test_runs_are_stopped_and_resumed_with_the_same_bits_as_the_table_of_the_command_shows() -> None:
    result = run_command(*shlex.split(STRESS)[1:], "--trials", "3", cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = re.findall(r"^\| (.+?) \| (\d+) \| (\d+) \| (\d+) \|", result.stdout, re.M)
    assert len(rows) >= 5
    stated = re.findall(r"^\| (.+?) \| (\d+) \| (\d+) \| (\d+) \|", (ROOT / "tests/stress.py").read_text(), re.M)
    survived = sum(int(tried) for name, tried, *_ in stated if "must differ" not in name)
    assert f"has {survived} stops and faults, each survived with equal bits" in " ".join(README.split())
    assert {name for name, *_ in rows} <= {name for name, *_ in stated}


@pytest.mark.slow
def test_the_families_are_compared_at_the_same_step_and_in_the_same_time() -> None:
    flags = ["--seeds=1", *TWO_STEPS, *SHORTER[1:], *SMALLER]
    result = run_command(*shlex.split(FAMILIES)[1:], "--architectures", "gpt2", "llama", *flags, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    number = r"\d+\.\d+"
    row = rf"^\| (\w+) \| [\d,]+ \| {number} \| {number} \({number} to {number}\) \| \d+ \| {number} .+\|$"
    assert re.findall(row, result.stdout, re.M) == ["gpt2", "llama"]


@pytest.mark.slow
def test_torchrun_runs_as_the_readme_says(workdir: Path) -> None:
    argv = ["-m", "torch.distributed.run", *shlex.split(TORCHRUN)[1:]]
    argv[argv.index("train.py")] = str(ROOT / "train.py")
    result = run_command(*argv, *SHORTER, *SMALLER, cwd=workdir)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in Path("runs").iterdir()] == ["version_0"]


@pytest.mark.slow
def test_runs_of_two_processes_are_stopped_and_resumed_as_the_readme_says() -> None:
    result = run_command(*shlex.split(STRESS_PROCESSES)[1:], "--trials", "2", cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^2 stops in (\d+) runs, of which \1 ended bitwise equal$", result.stdout, re.M)


@pytest.mark.slow
def test_the_cost_of_a_second_process_is_measured_beside_a_bare_loop() -> None:
    result = run_command(*shlex.split(PROCESSES_COST)[1:], "--rounds", "1", "--steps", "12", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^\| (.+?) \| [\d.]+ \([\d.]+ to [\d.]+\) \| [\d.]+ \|$", result.stdout, re.M)
    assert rows == ["slm, one process", "slm, two", "bare loop, two"]


@pytest.mark.slow
def test_training_beside_other_programs_is_measured() -> None:
    result = run_command(*shlex.split(SHARED_CORES)[1:], "--busy", "1", "--seconds", "2", "--turns", "1", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^\| (\w+) \| 1 \| [\d,]+ \([\d,]+ to [\d,]+\) \| [\d,]+ \(.+\) \|$", result.stdout, re.M)
    assert rows == ["small_text", "default"]


@pytest.mark.slow
def test_the_entropies_quoted_are_those_that_the_command_beside_them_prints(workdir: Path) -> None:
    printed = run_command(*shlex.split(ENTROPIES)[1:], cwd=workdir).stdout.split()
    [quoted] = re.findall(r"allows a loss of ([\d.]+), the last two ([\d.]+)", " ".join(README.split()))
    assert [f"{float(value):.2f}" for value in printed] == list(quoted)


@pytest.mark.slow
def test_the_benchmark_compares_with_its_bare_loop_and_the_teaching_script(workdir: Path) -> None:
    tiny = ["--model.vocab_size=64", "--data.num_tokens=20000", *SMALLER]
    result = run_command(*shlex.split(BENCHMARK)[1:], *tiny, cwd=workdir)
    assert result.returncode == 0, result.stderr
    figures = r"^\| (.+?) \| [\d.]+ \([\d.]+ to [\d.]+\) \| [\d,]+ \| \d+% \| [\d.]+ GB \| ([\d.]+) \|$"
    rows = dict(re.findall(figures, result.stdout, re.M))
    of_each_kind = r"[\d.]+ \([\d.]+ to [\d.]+\) \| [\d,]+ \| \d+% \| [\d.]+ GB"  # bf16, and AVX2
    stated = re.findall(rf"^\| (.+?) \| {of_each_kind} \| {of_each_kind} \|$", README, re.M)
    assert list(rows)[:3] == stated[:3] == ["slm", "its bare loop", "teaching script"]
    assert rows["slm"] == "1.00"
    assert "A step is 0.0 GFLOP" in result.stdout
    assert list(workdir.iterdir()) == []


@pytest.mark.slow
def test_the_benchmark_takes_a_recipe_and_measures_its_optimizer(workdir: Path) -> None:
    (workdir / "configs").symlink_to(ROOT / "configs")
    result = run_command("-m", "slm.benchmark", "--config=configs/small_text.yaml", *SMALLER, cwd=workdir)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("| loop | ms/step")
    assert re.search(r"The optimizer's step, 0\.0 GFLOP of these in (bfloat16|float32), takes [\d.]+ ms", result.stdout)
    assert "The other loops train with AdamW and without dropout." in result.stdout
    assert [path.name for path in workdir.iterdir()] == ["configs"]


@pytest.mark.slow
def test_the_speed_of_writing_is_measured_beside_hugging_face(workdir: Path) -> None:
    flags = ["--contexts=[16]", "--batch_sizes=[1,2]", "--rounds=1"]
    result = run_command(*shlex.split(GENERATE_BENCHMARK)[1:], *flags, cwd=workdir)
    assert result.returncode == 0, result.stderr
    figures = r"^\| (\d+) \| (\d+) \| [\d,]+ \([\d,]+ to [\d,]+\) \| [\d,]+ \| [\d.]+ \|$"
    assert re.findall(figures, result.stdout, re.M) == [("16", "1"), ("16", "2")]
    assert len(re.findall(figures, generate_benchmark.__doc__ or "", re.M)) == 2


@pytest.mark.slow
def test_the_page_is_served_as_the_readme_says(trained: Path) -> None:
    pytest.importorskip("nicegui")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, *shlex.split(LOOK)[1:], "--show=false", f"--port={port}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}  # it heeds that
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as page:
        try:
            assert page.stderr is not None
            said = page.stderr.readline()
            assert f"http://127.0.0.1:{port} shows {trained}/checkpoints/best.ckpt" in said
            answer = ""
            while page.poll() is None and not answer:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}") as response:
                    answer = response.read().decode()
            assert "Inside a language model" in answer
        finally:
            page.send_signal(signal.SIGINT)


@pytest.mark.slow
def test_a_sweep_is_trained_and_another_one_says_what_it_costs(workdir: Path) -> None:
    pytest.importorskip("optuna")
    trained, told = (run_command(*shlex.split(line)[1:], *SHORTER, *SMALLER, cwd=workdir) for line in SWEEPS)
    assert (trained.returncode, told.returncode) == (0, 0), trained.stderr + told.stderr
    rows = re.findall(r"^\| version_(\d), (\d), (\d) +\| 3 ", trained.stdout, re.M)
    assert sorted(number for row in rows for number in row) == list("012345")
    assert re.search(r"^20 runs: \d+:\d\d to \d+:\d\d in one process", told.stdout, re.M)


@pytest.mark.slow
def test_a_sweep_measures_the_command_at_each_value(workdir: Path) -> None:
    swept = [shlex.split(line)[4] for line in BENCHMARK_SWEEPS]
    assert swept == ["model.vocab_size"]
    result = run_command(
        *shlex.split(BENCHMARK_SWEEPS[0])[1:4], swept[0], "64,128", *SMALLER, "--data.num_tokens=9000", cwd=workdir
    )
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^\| (\d+) \| \d+ \| [\d.]+ \| \d+% \| [\d.]+ GB \|$", result.stdout, re.M) == ["64", "128"]


@pytest.mark.slow
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

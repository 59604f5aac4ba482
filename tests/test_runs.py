"""Runs stand side by side, the best first, with what they reached, took, and differ in."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RHYME, ROOT, SMALL_FLAGS, UNSHOWN

from slm.research.runs import by_settings, duration, read_run, read_runs
from slm.runs import main
from slm.watch.pictures import groups_figure
from slm.watch.tensorboard import read_curves, seconds_drawn

Run = Callable[..., str]
FLAGS = [
    *SMALL_FLAGS,
    *UNSHOWN,
    "--trainer.max_epochs=1",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
]


def rows(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, str]]:
    capsys.readouterr()
    main(list(argv))
    table = capsys.readouterr().out.partition("\n\n")[0]
    lines = [line.strip("|").split("|") for line in table.splitlines()]
    names = [name.strip() for name in lines[0]]
    return [dict(zip(names, map(str.strip, line), strict=False)) for line in lines[2:]]


def test_runs_are_listed_the_best_first_with_what_differs(slm: Run, capsys: pytest.CaptureFixture[str]) -> None:
    slm(*FLAGS, "--model.learning_rate=1e-5")
    slm(*FLAGS, "--model.learning_rate=1e-2", "--model.hidden_dim=16")
    best, other = rows(capsys)
    assert (best["run"], other["run"]) == ("version_1", "version_0")
    assert best["what differs"] == "model.hidden_dim=16, model.learning_rate=0.01"
    assert other["what differs"] == "model.hidden_dim=32, model.learning_rate=1e-05"
    curves = read_curves(Path("runs/version_1"))
    assert best["val/loss"] == f"{curves['val/loss'][-1][1]:.3f}"
    assert best["tokens"] == f"{16 * 112:,}"
    assert best["parameters"] == f"{20 * 16 + 16 * 16 + 16 * 6 + 16 * 3 * 17 + 16 * 17 + 2 * 16 * 16 + 32:,}"
    assert best["bits/byte"] == ""
    assert best["time"] == duration(read_run(Path("runs/version_1")).seconds)


@pytest.mark.slow
def test_text_in_different_tokens_is_compared_by_bits_per_byte(slm: Run, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    Path("text.txt").write_text((ROOT / "README.md").read_text()[:6000])
    text = [*[flag for flag in FLAGS if "num_tokens" not in flag], "--data=TextData", "--data.path=text.txt"]
    slm(*text, "--model.vocab_size=256")
    slm(*text, "--model.vocab_size=300", "--data.tokenizer=bpe")
    slm(*text, "--model.vocab_size=256", "--trainer.max_steps=1", "--trainer.limit_val_batches=0")
    *found, unvalidated = rows(capsys)
    assert (unvalidated["run"], unvalidated["bits/byte"]) == ("version_2", "")
    assert [float(row["bits/byte"]) for row in found] == sorted(float(row["bits/byte"]) for row in found)
    differs = {row["run"]: row["what differs"] for row in found}
    assert differs == {"version_0": "", "version_1": "data.tokenizer=bpe, model.vocab_size=300"}
    main([])
    assert "\n\nThe others have data.tokenizer=bytes, model.vocab_size=256, " in capsys.readouterr().out


def test_a_run_that_cannot_be_read_is_left_out_and_named(slm: Run, capsys: pytest.CaptureFixture[str]) -> None:
    slm(*FLAGS)
    for name, config in {"version_1": "model: {embed_dim: 3}", "version_2": "{"}.items():
        Path("runs", name).mkdir()
        Path("runs", name, "config.yaml").write_text(config)
    capsys.readouterr()
    main([])
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    first, second, page = err.splitlines()
    assert page == f"look inside the best with {sys.orig_argv[0]} -m slm.look --ckpt_path runs/version_0"
    assert first.startswith("left out: runs/version_1/config.yaml: embed_dim=3 is not divisible by num_heads=4")
    assert second.startswith("left out: runs/version_2/config.yaml is not valid YAML")


@pytest.mark.slow
def test_settings_of_another_kind_of_data_and_a_run_s_number_tell_nothing(
    slm: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.txt").write_text(RHYME * 60)
    unvalidated = "--trainer.limit_val_batches=0"
    slm(*FLAGS, unvalidated)
    text = [flag for flag in FLAGS if "num_tokens" not in flag and "vocab_size" not in flag]
    slm(*text, "--data=TextData", "--data.path=text.txt", "--model.vocab_size=256", unvalidated)
    shutil.copytree("runs/version_0", "runs/version_10")
    shutil.copytree("runs/version_1", "runs/version_11")
    found = rows(capsys)
    assert [row["run"] for row in found] == ["version_0", "version_1", "version_10", "version_11"]
    dummy, text_data = "data=DummyData, model.vocab_size=20", "data=TextData, model.vocab_size=256"
    assert [row["what differs"] for row in found] == [dummy, text_data] * 2


@pytest.mark.parametrize("folder", ["elsewhere", "--runs=elsewhere"])
def test_no_run_at_all_is_one_line(folder: str, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([folder])
    assert exit_info.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: there is no run under {workdir / 'elsewhere'}: start one")


@pytest.mark.slow
def test_time_is_that_of_all_its_processes_and_tokens_go_on(slm: Run) -> None:
    slm(*FLAGS)
    before = seconds_drawn(Path("runs/version_0"))
    slm("--ckpt_path=last", "--trainer.max_epochs=2")
    run = read_run(Path("runs/version_0"))
    assert run.seconds > before > 0
    assert run.tokens() == 2 * 16 * 112
    tokens = [step for step, _ in run.curves["train/tokens"]]
    assert tokens == list(range(len(tokens)))  # one at each step, also where a validation is beside it
    shutil.copytree("runs/version_0", "copy")
    assert seconds_drawn(Path("copy")) == run.seconds


@pytest.mark.parametrize(("seconds", "expected"), [(0.4, "0:00"), (61, "1:01"), (3723, "1:02:03")])
def test_a_duration_reads_as_a_clock(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_runs_that_differ_in_seeds_alone_are_one_row_and_one_curve_with_a_band(
    slm: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for rate in ("0.001", "0.01"):
        for seed in ("0", "1"):
            slm(*FLAGS, f"--model.learning_rate={rate}", f"--seed_everything={seed}")
    assert main(["--figure=runs.svg"]) is None
    said = capsys.readouterr()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in said.out.splitlines()]
    found = {row[0]: dict(zip(lines[0], row, strict=True)) for row in lines[2:]}
    assert list(found) == ["version_2, 3", "version_0, 1"]
    losses = [read_curves(Path(f"runs/version_{number}"))["val/loss"][-1][1] for number in (2, 3)]
    row = found["version_2, 3"]
    assert row["seeds"] == "2"
    assert row["val/loss"] == f"{sum(losses) / 2:.3f}"
    assert row["deviation"] == f"{abs(losses[0] - losses[1]) / 2**0.5:.3f}"
    assert row["lowest to highest"] == f"{min(losses):.3f} to {max(losses):.3f}"
    assert row["what differs"] == "model.learning_rate=0.01"
    assert "the figure is in runs.svg" in said.err
    assert Path("runs.svg").read_text().count("<path") > 10

    [best, other] = by_settings(read_runs(Path("runs")))
    assert (best.name, other.name) == ("version_2, 3", "version_0, 1")
    [(step, values)] = best.curve("val/loss")
    assert (step, values) == (read_curves(Path("runs/version_2"))["val/loss"][0][0], losses)
    figure = groups_figure({best.name: best.curve("val/loss")}, optimum=1.5)
    [axes] = figure.axes
    mean, optimum = axes.get_lines()
    assert mean.get_ydata()[-1] == pytest.approx(sum(losses) / 2)
    [band] = axes.collections
    assert {round(y, 5) for _, y in band.get_paths()[0].vertices} == {round(loss, 5) for loss in losses}
    assert optimum.get_label() == "optimum 1.500"


@pytest.mark.parametrize(
    ("name", "message"),
    [("runs.xyz", "figure=runs.xyz: give a name that ends in"), ("no/runs.png", ""), ("runs", "figure=runs: give")],
)
def test_a_figure_of_another_kind_is_refused(
    trained: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    if message:
        with pytest.raises(SystemExit) as exit_info:
            main([f"--figure={name}"])
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err
        assert not Path(name).is_file()
    else:
        main([f"--figure={name}"])
        assert Path(name).read_bytes().startswith(b"\x89PNG")

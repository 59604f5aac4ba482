"""Runs that were written before the options of the network had one home (`old_run/make.sh`) still go on."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, slow_after_first

import slm as package
from slm import generate, runs

RUNS = ROOT / "tests/old_run"


@pytest.fixture(autouse=True)
def old_runs(workdir: Path) -> None:
    shutil.copytree(RUNS, "runs")
    shutil.copy(ROOT / "LICENSE", "text.txt")


@pytest.mark.parametrize(("run", "loss"), slow_after_first([("version_0", 2.925), ("version_1", 4.221)]))
def test_an_old_run_ends_with_the_loss_that_it_had_then(run: str, loss: float, slm: Callable[..., str]) -> None:
    output = slm("--ckpt_path", f"runs/{run}", "--trainer.max_steps=40", "--trainer.enable_progress_bar=false")
    changed = re.findall(r"^(\S+) is now", output, re.M)
    assert {*changed} <= {"data.path", "trainer.enable_progress_bar", "trainer.max_steps"}
    [found] = re.findall(r"^val/loss +([\d.]+)", output, re.M)
    assert float(found) == pytest.approx(loss, abs=2e-3)


@pytest.mark.parametrize("path", ["runs/version_1", "runs/version_1/simple_language_model.pt"])
def test_old_weights_are_loaded_and_write(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = package.load(path)
    assert model(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, 256)
    generate.main(["--ckpt_path", path, "--prompt", "The ", "--max_new_tokens=5"])
    assert capsys.readouterr().out.startswith("The ")


def test_old_runs_are_listed_with_their_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    runs.main([])
    rows = re.findall(r"^\| (version_\d) .*?\| ([\d,]+) ", capsys.readouterr().out, re.M)
    sizes = {name: sum(w.numel() for w in package.load(f"runs/{name}").transformer.parameters()) for name, _ in rows}
    assert {name: int(size.replace(",", "")) for name, size in rows} == sizes

"""A scaling law is found from what follows it, with an honest uncertainty, and foretells the largest model."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT, UNSHOWN, run_command
from test_readme import SCALING

from slm.errors import InputError
from slm.research.law import Law, fit
from slm.scaling import main

TRUE = Law(1.8, 50.0, 800.0, 0.35, 0.45)
POINTS = [(parameters, tokens) for parameters in (2e4, 4e4, 8e4, 1.6e5) for tokens in (2.5e5, 1e6, 4e6, 1.6e7)]
SIZES, TOKENS = zip(*POINTS, strict=True)
TINY = [
    *UNSHOWN,
    "--model.vocab_size=48",
    "--model.max_seq_len=16",
    "--model.num_layers=1",
    "--model.learning_rate=0.005",
    "--data.batch_size=16",
    "--trainer.precision=32-true",
    "--trainer.accelerator=cpu",
]
RUNS = Path("runs")


def noisy_losses(deviation: float) -> list[float]:
    noise = torch.randn(len(POINTS), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * deviation
    return [TRUE.loss(*point) * (1 + error) for point, error in zip(POINTS, noise.tolist(), strict=True)]


def test_a_law_is_found_from_losses_that_follow_it() -> None:
    found = fit(SIZES, TOKENS, noisy_losses(0.0)).law
    assert vars(found) == pytest.approx(vars(TRUE), rel=1e-4)


def test_no_law_near_the_one_that_is_found_fits_better() -> None:
    losses = noisy_losses(0.01)
    found = fit(SIZES, TOKENS, losses).law

    def squares(law: Law) -> float:
        return sum((law.loss(*point) / loss - 1) ** 2 for point, loss in zip(POINTS, losses, strict=True))

    generator = torch.Generator().manual_seed(1)
    for size in (1e-2, 1e-3, 1e-4):
        for factors in (1 + size * torch.randn(200, 5, generator=generator, dtype=torch.float64)).tolist():
            other = Law(*(value * factor for value, factor in zip(vars(found).values(), factors, strict=True)))
            assert squares(other) >= squares(found) * (1 - 1e-6)


def test_the_truth_lies_between_the_resampled_laws_which_spread_with_the_noise() -> None:
    widths = []
    for deviation in (0.001, 0.01):
        found = fit(SIZES, TOKENS, noisy_losses(deviation))
        low, high = found.interval(lambda law: law.loss(6.4e5, 6.4e7))
        assert low < TRUE.loss(6.4e5, 6.4e7) < high
        widths.append(high - low)
    assert 3 < widths[1] / widths[0] < 30


def test_the_best_size_for_a_compute_is_where_the_loss_is_lowest() -> None:
    flops = 1e13
    sizes = [10 ** (3 + step / 1000) for step in range(5000)]
    lowest = min(sizes, key=lambda size: TRUE.loss(size, flops / 6 / size))
    assert TRUE.best_parameters(flops) == pytest.approx(lowest, rel=2e-3)


def test_too_few_points_are_refused() -> None:
    with pytest.raises(InputError, match="5 points are too few"):
        fit(SIZES[:5], TOKENS[:5], noisy_losses(0)[:5])
    with pytest.raises(InputError, match="2 sizes are too few"):
        fit(SIZES[:8], TOKENS[:8], noisy_losses(0)[:8])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--embed_dims", "16", "32"], "embed_dims=[16, 32]: a law is seen in three different values or more"),
        (["--embed_dims", "16", "20", "32"], "embed_dims=[20]: a head has 8 values, give multiples of that"),
        (["--tokens", "100", "8000", "9000"], "tokens=100 are 0 batches of 256: give more"),
        (
            ["--model.learning_rate", "0.1", "0.2"],
            "--model.learning_rate 0.1 0.2: the ladder takes one",
        ),
        (["--model.hidden_dim=7"], "--model.hidden_dim: the ladder sets that"),
        (
            ["--trainer.max_steps=7", "--model.embed_dim=8"],
            "--trainer.max_steps, --model.embed_dim: the ladder sets that",
        ),
        (["--trainer.max_time=00:00:01:00"], "trainer.max_time: every model of the ladder trains on its tokens"),
        (["--ckpt_path=last"], "--ckpt_path: only new runs are trained here"),
        (["--data=TextData", f"--data.path={ROOT / 'README.md'}", "--model.vocab_size=256"], "each token once: give"),
    ],
)
def test_what_makes_no_ladder_is_refused(
    argv: list[str], message: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([*TINY, *argv])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(RUNS.glob("version_*"))


def test_what_the_ladder_sets_in_place_of_a_file_of_settings_is_said(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("sizes.yaml").write_text("model: {hidden_dim: 7}")
    with pytest.raises(SystemExit):
        main([*TINY, "--config=sizes.yaml", "--tokens", "100", "8000", "9000"])
    first, error = capsys.readouterr().err.splitlines()
    assert first.startswith("whatever --config says, the ladder sets model.embed_dim, model.hidden_dim, ")
    assert error.startswith("error: tokens=100 are 0 batches")


@pytest.mark.slow
def test_the_largest_model_is_foretold_before_it_is_trained(workdir: Path) -> None:
    argv = [*shlex.split(SCALING)[1:], *TINY, "--embed_dims", "8", "16", "32", "--tokens", "4096", "8192", "16400"]
    first = run_command(*argv, cwd=workdir)
    assert first.returncode == 0, first.stderr
    [file] = (RUNS / "sweep").glob("prediction-*.json")
    foretold = json.loads(file.read_text())
    assert file.stat().st_mtime < (RUNS / "version_8/config.yaml").stat().st_mtime
    assert first.stderr.index("is expected to reach") < first.stderr.index("1 of 1: --model.embed_dim=32")
    rows = re.findall(r"^\| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", first.stdout, re.M)
    losses = [float(loss) for _, *row in rows for loss in row]
    sizes = [int(size.replace(",", "")) for size, *_ in rows for _ in range(3)]
    [header] = re.findall(r"^\| parameters \| (.+) tokens \|$", first.stdout, re.M)
    tokens = [int(number.replace(",", "")) for number in header.split(" tokens | ")] * 3
    assert tokens == [4096, 8192, 16384] * 3  # whole batches
    without_largest = fit(sizes[:-1], tokens[:-1], losses[:-1]).law
    assert foretold["loss"] == pytest.approx(without_largest.loss(sizes[-1], tokens[-1]), abs=0.02)
    whole = fit(sizes, tokens, losses).law
    [stated] = re.findall(r"^E = ([\d.]+),", first.stdout, re.M)
    assert float(stated) == pytest.approx(whole.irreducible, abs=0.02)
    [truth] = re.findall(r"^in truth E = ([\d.]+)$", first.stdout, re.M)
    assert 0 < float(truth) < min(losses)
    assert math.isclose(float(re.findall(r"and reached ([\d.]+)", first.stdout)[0]), losses[-1])
    assert (RUNS / "law.png").read_bytes().startswith(b"\x89PNG")
    again = run_command(*argv, cwd=workdir)
    assert again.stdout == first.stdout
    assert len(list(RUNS.glob("version_*"))) == 9
    file.unlink()
    late = run_command(*argv, cwd=workdir)
    assert late.returncode == 2
    assert "a prediction would come too late" in late.stderr

"""What the benchmark counts; that it runs is shown by the README's test."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gpu_report
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch.utils.flop_counter import FlopCounterMode

from slm import benchmark, generate_benchmark
from slm.baselines import TeachingScript
from slm.benchmark import Clock, flops_per_step, main
from slm.training.language_model import LanguageModel
from slm.training.optimizers import build_optimizer, matmul_flops
from slm.watch.monitor import Forecast

SIZES = {
    "vocab_size": 70, "embed_dim": 24, "num_heads": 3, "num_layers": 2, "hidden_dim": 40, "max_seq_len": 12,
}  # fmt: skip


def counted(logits_of: Callable[[torch.Tensor], torch.Tensor]) -> int:
    tokens = torch.zeros(5, SIZES["max_seq_len"], dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(logits_of(tokens).flatten(0, 1), tokens.flatten()).backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("options", [{}, {"architecture": "llama", "num_kv_heads": 1, "tie_embeddings": False}])
def test_the_operations_of_a_step_are_those_that_torch_counts(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = LanguageModel(**{**SIZES, "embed_dim": 30, **options})
    assert flops_per_step({**model.hparams, "batch_size": 5}) == counted(model)


def test_the_end_of_the_run_that_is_measured_is_not_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "Turns", lambda: None)  # which takes this process's stdout
    clock = Clock()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[Forecast(), clock])
    clock.setup(trainer, LanguageModel(**SIZES), "fit")
    assert clock in trainer.callbacks
    assert not any(isinstance(callback, Forecast) for callback in trainer.callbacks)


def test_the_teaching_script_does_the_same_operations() -> None:
    with torch.device("meta"):
        model = TeachingScript(SIZES)
    assert flops_per_step({**LanguageModel(**SIZES).hparams, "batch_size": 5}) == pytest.approx(
        counted(model), rel=1e-6
    )


@pytest.mark.parametrize(("optimizer", "has_products"), [("muon", True), ("adamw", False)])
def test_the_operations_of_an_optimizer_are_those_that_torch_counts(optimizer: str, has_products: bool) -> None:
    model = LanguageModel(**SIZES, optimizer=optimizer)
    built = build_optimizer(model.transformer, model.hparams, fused=False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with FlopCounterMode(display=False) as counter:
        built.step()
    assert matmul_flops(built) == int(counter.get_total_flops())
    assert (matmul_flops(built) > 0) == has_products


@pytest.mark.slow
def test_the_report_of_a_gpu_goes_through_on_a_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {**SIZES, "embed_dim": 8, "num_heads": 1, "num_layers": 1, "max_seq_len": 16}
    flags = [f"--model.{name}={value}" for name, value in tiny.items()]
    flags += ["--data.num_tokens=2000", "--data.batch_size=4", "--trainer.accelerator=cpu"]
    others = {"beside others", "need a GPU"}  # commands with tests of their own
    parts = gpu_report.parts
    kept = lambda *given: {k: v for k, v in parts(*given).items() if not any(name in k for name in others)}  # noqa: E731
    monkeypatch.setattr(gpu_report, "parts", kept)
    monkeypatch.setattr(gpu_report, "ROUNDS", 2)
    with pytest.raises(SystemExit) as exit_info:
        gpu_report.main(["--output", str(tmp_path / "report.md"), *flags])
    report = (tmp_path / "report.md").read_text()
    assert exit_info.value.code == 0, report
    assert report.count("## ") == 4
    assert all(f"| {name} | " in report for name in (*gpu_report.DEFAULT, "124 M"))
    assert "tensors are equal to the bit" in report


runs_a_process = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["validate"], "validate: the benchmark trains, give it the flags of train.py alone"),
        (["validat"], "validat: the benchmark trains, give it the flags of train.py alone"),
        (["--ckpt_path", "last"], "leave out --ckpt_path"),
        (["--ckpt_path=last"], "leave out --ckpt_path"),
        (["--sweep", "model.embed_dim"], "--sweep model.embed_dim: give a flag and its values"),
        (["--model.embed_dim", "32", "--sweep", "model.vocab_size", "9"], "--sweep comes first"),
        runs_a_process(
            ["--trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches=2: the benchmark counts"
        ),
        runs_a_process(["--trainer.precision=bf16-true"], "trainer.precision=bf16-true: the other loops know"),
        runs_a_process(["--model.short_context_steps=4"], "model.short_context_steps=4: the other loops read whole"),
        runs_a_process(["--model.embed_dim", "130"], "embed_dim=130 is not divisible by num_heads=4"),
    ],
    ids=[
        "subcommand",
        "no flag",
        "checkpoint",
        "checkpoint by =",
        "values",
        "order",
        "accumulation",
        "precision",
        "short",
        "flag",
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    flags: list[str], message: str, workdir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(flags)
    printed, said = capfd.readouterr()  # by its processes too
    assert printed == ""
    assert exit_info.value.code == 2
    [error] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert message in error
    assert "Traceback" not in said


@pytest.mark.slow
def test_what_its_flags_print_instead_is_printed(workdir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--model.embed_dim=48", "--print_config"])
    assert exit_info.value.code == 0
    assert "embed_dim: 48" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--contexts=16"], "contexts=16: expected a list like [1,2]"),
        (["--contexts=[8]"], "contexts=[8] must be above 8, the tokens of the prompt"),
        (["--batch_sizes=[0]"], "batch_sizes=[0] must be at least 1"),
        (["--rounds=0"], "rounds=0 must be at least 1"),
    ],
)
def test_the_benchmark_of_writing_refuses_what_it_cannot_measure(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        generate_benchmark.main(flags)
    assert capsys.readouterr().err == f"error: {message}\n"

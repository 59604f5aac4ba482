"""The command line as a whole: defaults, Lightning's own flags, and what is refused."""

import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL_FLAGS, UNSHOWN, not_of_the_machine, refusal, run_command, slow_after_first
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

import slm.hardware
from slm.cli import main
from slm.command import parser
from slm.command.settings import read_command
from slm.command.trainer import new_trainer
from slm.errors import InputError
from slm.run.callbacks import BestCheckpoint, LastCheckpoint
from slm.run.folder import RunFolder, claim_run
from slm.run.signals import Progress
from slm.watch.monitor import ProgressBar

Run = Callable[..., str]
RUN = Path("runs/version_0")
EARLY = "{trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/loss, mode: sideways}}]}}"
QUIET = ["--trainer.enable_progress_bar=false"]
SHOWN = [*SMALL_FLAGS, *QUIET, "--trainer.max_epochs=2"]
SMALL = [*SHOWN, *UNSHOWN]

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def built(*argv: str) -> Trainer:
    """The Trainer that a command line asks for, before it begins to train."""
    command = read_command(argv)
    return new_trainer(command, command.instantiate(), RunFolder(None, Path("runs"), Progress()))


# ---- what the default command builds


def test_the_default_trainer_has_the_promised_policy(workdir: Path) -> None:
    trainer = built()
    assert trainer.max_epochs == 5
    assert trainer.gradient_clip_val == 1.0
    assert [type(logger).__name__ for logger in trainer.loggers] == ["Curves"]
    kinds = {type(callback) for callback in trainer.callbacks}
    assert {ProgressBar, BestCheckpoint, LastCheckpoint} <= kinds
    [best] = trainer.checkpoint_callbacks
    assert isinstance(best, ModelCheckpoint)
    assert (best.monitor, best.filename) == ("val/loss", "best")


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="chooses for a CPU")
@pytest.mark.parametrize(("native", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_16_mixed_on_a_cpu_becomes_what_the_processor_does_well_and_says_so(
    native: bool, expected: str, workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slm.hardware, "has_native_bf16", lambda: native)
    assert built().precision == expected
    assert f"precision 16-mixed becomes {expected}" in capsys.readouterr().err


def test_a_precision_that_is_asked_for_is_kept(workdir: Path) -> None:
    assert built("--trainer.precision", "64-true", "--trainer.accelerator", "cpu").precision == "64-true"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_in_16_mixed(slm: Run) -> None:
    assert "val/loss" in slm(*SHOWN, "--trainer.accelerator=gpu", "--trainer.devices=1")
    assert "becomes" not in slm(*SHOWN, "--trainer.accelerator=gpu", "--trainer.devices=1")


# ---- one run


def test_a_run_leaves_one_folder_and_a_report_that_names_it(slm: Run, workdir: Path) -> None:
    output = slm(*SHOWN)
    files = {path.relative_to(RUN).as_posix() for path in RUN.rglob("*") if path.is_file()}
    events = {name for name in files if name.startswith("events.out.tfevents.")}
    assert events
    checkpoints = {"checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    pictures = {"loss.png", "projector_config.pbtxt"}
    pictures |= {f"00008/token_embedding/{name}.tsv" for name in ("tensors", "metadata")}
    assert (
        files - events - pictures == {".lock", "config.yaml", "hparams.yaml", "simple_language_model.pt"} | checkpoints
    )
    assert pictures <= files
    names = "val/loss|perplexity|accuracy|run|best|last|look inside|see curves|resume|go longer"
    report = dict(re.findall(rf"^({names}) +(.+)$", output, re.M))
    assert re.fullmatch(r"\d\.\d{3}, optimum \d\.\d{3}, unigram \d\.\d{3} \(best.ckpt\)", report["val/loss"])
    assert report["best"] == str(RUN / "checkpoints/best.ckpt")
    assert report["last"] == str(RUN / "checkpoints/last.ckpt")
    assert report["resume"].endswith(f" --ckpt_path {RUN}/checkpoints/last.ckpt")
    assert report["go longer"].endswith(f" --ckpt_path {RUN}/checkpoints/last.ckpt --trainer.max_epochs 4")
    assert report["look inside"].endswith(" -m slm.look --ckpt_path runs/version_0")
    assert report["see curves"].endswith(" -m tensorboard.main --logdir runs")
    assert "ckpt_path" not in (RUN / "config.yaml").read_text()


def test_the_report_gives_the_loss_of_the_best_checkpoint(slm: Run, trained: Path) -> None:
    output = slm("--ckpt_path=last", "--trainer.max_epochs=3", "--model.learning_rate=1")  # which spoils it
    stored = torch.load(RUN / "checkpoints/best.ckpt", weights_only=True)
    best = next(v for k, v in stored["callbacks"].items() if k.startswith("BestCheckpoint"))["best_model_score"]
    assert stored["global_step"] < torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert f"val/loss    {best.item():.3f}," in output


@pytest.mark.slow
def test_nothing_is_printed_that_the_project_did_not_mean(workdir: Path) -> None:
    result = run_command(str(ROOT / "train.py"), *SHOWN, cwd=workdir)
    assert result.returncode == 0, result.stderr
    allowed = "val/loss|perplexity|accuracy|run|best|last|losses|look inside|see curves|resume|go longer"
    assert [line for line in result.stdout.splitlines() if not re.match(rf"({allowed}) ", line)] == []
    assert not_of_the_machine(result.stderr) == []


@pytest.mark.slow
def test_a_terminal_shows_loss_validation_loss_and_speed_in_the_bar(slm: Run) -> None:
    output = slm(*SMALL_FLAGS, *UNSHOWN, "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1")
    last_line = [line for line in re.split(r"[\r\n]", output) if line.startswith("Epoch 1: 100%")][-1]
    assert re.search(r"loss=\d\.\d{3}, val_loss=\d\.\d{3}, tokens/s=[\d,]+\]", last_line)
    assert "v_num" not in output


@pytest.mark.slow
def test_each_run_gets_the_next_folder(slm: Run) -> None:
    slm(*SMALL)
    slm(*SMALL)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["version_0", "version_1"]


@pytest.mark.slow
def test_it_runs_from_any_folder_as_a_module_too(workdir: Path) -> None:
    result = run_command("-m", "slm.cli", "--print_config", cwd=workdir)
    assert "max_epochs: 5" in result.stdout, result.stderr


def test_help_lists_the_flags_of_trainer_model_and_data(slm: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        slm("--help")
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--trainer.max_epochs", "--model.embed_dim", "--data.help"))


def test_print_config_shows_what_is_in_force(slm: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        slm("--model.embed_dim", "64", "--print_config")
    text = capsys.readouterr().out
    assert "embed_dim: 64" in text
    assert "max_epochs: 5" in text


@pytest.mark.parametrize("config", slow_after_first(CONFIGS), ids=lambda path: path.name)
def test_every_shipped_config_trains(slm: Run, config: Path) -> None:
    sizes = ["embed_dim=144", "num_layers=1", "hidden_dim=64", "max_seq_len=32"]
    smaller = [*sizes, "compile=false", "short_context_steps=1"]
    output = slm(
        f"--config={config}",
        *QUIET,
        *UNSHOWN,
        *(f"--model.{size}" for size in smaller),
        "--data.batch_size=2",
        "--trainer.max_steps=2",
        "--trainer.limit_val_batches=1",
        "--trainer.val_check_interval=1",
    )
    assert re.search(r"^val/loss +\d", output, re.M)


@pytest.mark.slow
def test_text_reports_bits_per_byte(slm: Run, workdir: Path) -> None:
    (workdir / "mine.txt").write_text("the cat sat on the mat. " * 200)
    output = slm(
        "--config", str(ROOT / "configs/text.yaml"), "--data.path=mine.txt", *QUIET, *UNSHOWN, "--trainer.max_epochs=1"
    )
    loss = float(re.search(r"^val/loss +([\d.]+) \(best.ckpt\)$", output, re.M)[1])  # type: ignore[index]
    bits = float(re.search(r"^bits/byte +([\d.]+)$", output, re.M)[1])  # type: ignore[index]
    held_out = 4 * 128  # tokens, of which the last ends the text
    assert bits == pytest.approx(loss / 0.693147 * held_out / (held_out - 1), abs=2e-3)
    assert torch.load(RUN / "simple_language_model.pt", weights_only=True)["tokenizer"] == "bytes"


@pytest.mark.slow
def test_two_devices_train_as_one_run(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.devices=2", "--data.val_fraction=0.04"]
    result = run_command(str(ROOT / "train.py"), *SHOWN, *flags, cwd=workdir)
    assert result.returncode == 0, result.stderr
    assert len(result.stderr.splitlines()) == 2  # how they share a batch, and the precision
    assert [path.name for path in (workdir / "runs").iterdir()] == ["version_0"]
    [loss] = re.findall(r"^val/loss +([\d.]+)", result.stdout, re.M)
    capsys.readouterr()
    main(["validate", "--ckpt_path=best"])
    [alone] = re.findall(r"val/loss[ │]+([\d.]+)", capsys.readouterr().out)
    assert float(loss) == pytest.approx(float(alone), abs=6e-4)


# ---- Lightning's own flags


def test_fast_dev_run_keeps_nothing_and_says_so(slm: Run, workdir: Path) -> None:
    assert "not kept: fast_dev_run" in slm(*SMALL, "--trainer.fast_dev_run=true")
    assert list(workdir.iterdir()) == []


def test_max_steps_stops_there_and_the_report_offers_more_steps(slm: Run) -> None:
    output = slm(*SMALL, "--trainer.max_steps=3")
    assert torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
    assert "nothing was validated" in output
    assert "--trainer.max_steps 6" in output


@pytest.mark.slow
def test_max_time_stops_the_run_with_its_last_checkpoint(slm: Run) -> None:
    output = slm(*SMALL, "--trainer.max_epochs=100000", "--trainer.max_time=00:00:00:01")
    assert f"last        {RUN}/checkpoints/last.ckpt" in output


@pytest.mark.slow
def test_limit_train_batches_shortens_the_epoch(slm: Run) -> None:
    slm(*SMALL, "--trainer.limit_train_batches=2")
    assert torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


def test_without_validation_the_report_says_what_is_missing(slm: Run) -> None:
    output = slm(*SMALL, "--trainer.limit_val_batches=0")
    assert "val/loss    none: nothing was validated" in output
    assert "best        none" in output
    assert (RUN / "checkpoints/last.ckpt").is_file()


@pytest.mark.slow
def test_a_validation_on_a_part_is_called_so(slm: Run) -> None:
    assert "(on 1 of 6 batches: limit_val_batches=1)" in slm(
        *SMALL, "--data.batch_size=2", "--trainer.limit_val_batches=1"
    )


@pytest.mark.parametrize("flag", ["limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches"])
def test_a_whole_number_of_batches_is_that_many_and_a_fraction_a_share(workdir: Path, flag: str) -> None:
    assert repr(getattr(built(f"--trainer.{flag}=1"), flag)) == "1"
    assert repr(getattr(built(f"--trainer.{flag}=1.0"), flag)) == "1.0"


@pytest.mark.slow
def test_overfit_batches_trains_on_one_batch(slm: Run) -> None:
    assert "val/loss" in slm(*SMALL, "--trainer.overfit_batches=1")
    assert torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.slow
def test_accumulation_steps_once_for_several_batches(slm: Run) -> None:
    slm(*SMALL, "--data.batch_size=16", "--trainer.accumulate_grad_batches=4")
    assert torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.slow
def test_validation_every_second_epoch_gives_a_best_checkpoint(slm: Run) -> None:
    slm(*SMALL, "--trainer.check_val_every_n_epoch=2")
    assert torch.load(RUN / "checkpoints/best.ckpt", weights_only=True)["epoch"] == 2


@pytest.mark.slow
def test_validation_within_an_epoch_works(slm: Run) -> None:
    assert "val/loss" in slm(*SMALL, "--trainer.val_check_interval=0.5", "--trainer.max_epochs=1")


@pytest.mark.slow
def test_without_a_logger_there_are_no_curves_and_the_report_says_so(slm: Run) -> None:
    assert "see curves  none" in slm(*SMALL, "--trainer.logger=false")
    assert not list(RUN.glob("events*"))
    assert (RUN / "checkpoints/best.ckpt").is_file()


@pytest.mark.slow
def test_without_checkpointing_none_is_written_and_the_report_says_so(slm: Run) -> None:
    output = slm(*SMALL, "--trainer.enable_checkpointing=false")
    assert re.search(r"best +none\nlast +none", output)
    assert "resume" not in output
    assert not list(RUN.rglob("*.ckpt"))


@pytest.mark.slow
def test_the_sanity_check_can_be_left_out(slm: Run) -> None:
    assert "val/loss" in slm(*SMALL, "--trainer.num_sanity_val_steps=0")


def test_a_callback_and_a_logger_of_the_users_join_the_projects(slm: Run, workdir: Path) -> None:
    (workdir / "mine.yaml").write_text(
        "trainer:\n"
        "  callbacks:\n"
        "    - {class_path: EarlyStopping, init_args: {monitor: val/loss, patience: 1, min_delta: 100}}\n"
        "  logger: {class_path: CSVLogger, init_args: {save_dir: csv}}\n"
    )
    trainer = built(*SMALL, "--config=mine.yaml")
    assert {EarlyStopping, BestCheckpoint} <= {type(callback) for callback in trainer.callbacks}
    assert [type(logger).__name__ for logger in trainer.loggers] == ["Curves", "CSVLogger"]
    shutil.rmtree("runs")
    assert re.search(
        r"^stopped +early, at step \d+, by a callback$",
        slm(*SMALL, "--config=mine.yaml", "--trainer.max_epochs=9"),
        re.M,
    )
    assert "val/loss" in next(workdir.glob("csv/**/metrics.csv")).read_text()
    assert torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 2


# ---- what is refused


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.embd_dim", "5"], "unknown setting model.embd_dim; the nearest known one is model.embed_dim"),
        (["--data.pth", "x"], "unknown setting data.pth; the nearest known one is data.path"),
        (["--nonsense"], "unknown setting nonsense"),
        (["trian"], "trian is not what train.py does: give fit, validate, test, predict or a flag"),
        (["fitt"], "fitt is not what train.py does: give fit, validate, test, predict or a flag"),
        (["--trainer.max_epochs=abc"], "trainer.max_epochs=abc: expected int or null"),
        (["--model.embed_dim=1.5"], "model.embed_dim=1.5: expected int"),
        (["--data.batch_size=x"], "data.batch_size=x: expected int"),
        (["--model.optimizer=lion"], "model.optimizer=lion: expected one of 'adamw', 'adam', 'sgd'"),
        (["--data.source=zipf"], "data.source=zipf: expected one of 'markov', 'uniform'"),
        (["--data=Foo"], "data=Foo: there is no such class; give DummyData or TextData"),
        (["--trainer.logger=Foo"], "trainer.logger=Foo: there is no such class"),
        (["--trainer.max_epochs"], "trainer.max_epochs needs a value"),
        (["--data.seed", "-x"], "data.seed needs a value: one that begins with a dash is given as --data.seed=-x"),
        (["--data.path", "-t.txt"], "data.path needs a value: one that begins with a dash is given as --data.path=-t"),
        (["--model.num_layers=0"], "num_layers=0 must be at least 1"),
        (["--model.dropout=1"], "dropout=1.0 must be at least 0 and below 1"),
        (["--model.learning_rate=-1"], "learning_rate=-1.0 must be above 0"),
        (["--model.learning_rate=1e39"], "learning_rate=1e+39 must be above 0 and below 3.4e+38"),
        (["--data.batch_size=0"], "batch_size=0 must be at least 1"),
        (["--data.vocab_size=50"], "data.vocab_size is taken from the model: set model.vocab_size instead"),
        (["--data.init_args.max_seq_len", "9"], "data.max_seq_len is taken from the model: set model.max_seq_len"),
        (["--data=TextData"], "vocab_size=10000 does not fit text as bytes"),
        (["--data", "{class_path: DummyData, init_args: {vocab_size: 9}}"], "data.vocab_size is taken from the model"),
        (["--data.init_args", "{max_seq_len: 9}"], "data.max_seq_len is taken from the model"),
        (["--config", "{data: {init_args: {vocab_size: 9}}}"], "data.vocab_size is taken from the model"),
        (["--config", "{ckpt_path: last}"], "ckpt_path stands in a file of settings: give it as --ckpt_path"),
        (["--data.path=x"], "data.path is a setting of TextData, which is not the data chosen"),
        (["--data=TextData", "--model.vocab_size=256", "--data.path="], "data.path is empty"),
        (["--data=null"], "data"),
        (["--model.vocab_size=0"], "vocab_size=0 must be at least 1"),
        (["--model.max_seq_len=0"], "max_seq_len=0 must be at least 1"),
        (["--trainer.accelerator=foo"], "invalid accelerator name"),
        (["--trainer.accelerator=tpu"], "torch_xla"),
        (["--trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches=0 must be at least 1"),
        (
            ["--trainer.val_check_interval=0"],
            "trainer.val_check_interval=0 must be a whole number of batches",
        ),
        (
            ["--trainer.val_check_interval=-2"],
            "trainer.val_check_interval=-2 must be a whole number of batches",
        ),
        (["--trainer.val_check_interval=1.5"], "trainer.val_check_interval=1.5 must be a whole number of batches"),
        (["--trainer.val_check_interval=0.0"], "trainer.val_check_interval=0.0 must be a whole number of batches"),
        (["--trainer.val_check_interval={seconds: -1}"], "trainer.val_check_interval={'seconds': -1} must be longer"),
        (["--trainer.max_time={hours: -1}"], "trainer.max_time={'hours': -1} must be longer than no time"),
        (["--trainer.max_time={foo: 1}"], "trainer.max_time={'foo': 1} is no length of time"),
        (
            ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval={seconds: 9}"],
            "trainer.val_check_interval={'seconds': 9} may fall inside a step of accumulate_grad_batches=2",
        ),
        (
            [
                "--config",
                "{trainer: {callbacks: [{class_path: GradientAccumulationScheduler, "
                "init_args: {scheduling: {0: 1, 1: 2}}}]}}",
            ],
            "GradientAccumulationScheduler changes how many batches make a step: use accumulate_grad_batches",
        ),
        (["--trainer.strategy=ddp_fork"], "trainer.strategy=ddp_fork gives nothing back of what it trains: use ddp"),
        (["--trainer.logger", "-x"], "trainer.logger needs a value: one that begins with a dash is given as"),
        (["--config", EARLY], "mode"),
        (["--data.batch_size=null"], "a class cannot be made with these settings"),
        (["--model.weight_decay=.inf"], "weight_decay=inf must be at least 0, and finite"),
        (["--trainer.check_val_every_n_epoch=0"], "trainer.check_val_every_n_epoch=0 must be at least 1"),
        (["--trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val=-1 must be at least 0"),
        (["--trainer.gradient_clip_val=.nan"], "trainer.gradient_clip_val=nan must be at least 0, and finite"),
        (["--trainer.max_epochs=-2"], "trainer.max_epochs=-2 must be at least -1"),
        (["--trainer.min_epochs=-1"], "trainer.min_epochs=-1 must be at least 0"),
        (["--trainer.log_every_n_steps=-1"], "trainer.log_every_n_steps=-1 must be at least 0"),
        (["--trainer.num_sanity_val_steps=-2"], "trainer.num_sanity_val_steps=-2 must be at least -1"),
        (["--trainer.limit_train_batches=-1"], "trainer.limit_train_batches=-1 must be at least 0"),
        (["--trainer.overfit_batches=-0.5"], "trainer.overfit_batches=-0.5 must be at least 0"),
        (["--seed_everything=-1"], "seed_everything=-1 must be at least 0"),
        (
            ["--config=nothing.yaml"],
            "nothing.yaml cannot be read: No such file or directory; give a YAML file",
        ),
        (["--ckpt_path"], "--ckpt_path needs a value"),
        (["--ckpt_path=last"], "there is no run under"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_with_the_value_and_the_remedy(workdir: Path, argv: list[str], message: str) -> None:
    assert message in refusal(*argv)
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--trainer.max_epoch=5"], "unknown setting trainer.max_epoch; the nearest known one is trainer.max_epochs"),
        (["--data.path=caf\udce9.txt"], "b'--data.path=caf\\xe9.txt' is not UTF-8: rename the file"),
        (["--model.embed_dim=130"], "embed_dim=130 is not divisible by num_heads=4"),
        (["--data.num_tokens=100"], "100 tokens are too few"),
        (
            [*SMALL, "--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=3"],
            "trainer.val_check_interval=3 batches (of 4 in an epoch) falls inside a step of accumulate_grad_batches=2",
        ),
        (
            [
                *SMALL,
                "--trainer.accumulate_grad_batches=5",
                "--trainer.val_check_interval=10",
                "--trainer.check_val_every_n_epoch=null",
            ],
            "falls inside a step of accumulate_grad_batches=5: give multiples of that",
        ),
        (["--trainer.max_steps=-2"], "trainer.max_steps=-2 must be at least -1"),
        ([*SMALL, "--trainer.val_check_interval=5000"], "val_check_interval"),
        (["--trainer.devices=abc"], "devices"),
        (["--ckpt_path=nothing.ckpt"], "ckpt_path=nothing.ckpt: there is no such file"),
        (["validate"], "validate needs --ckpt_path"),
    ],
    ids=lambda value: " ".join(value).removeprefix(" ".join(SMALL)) if isinstance(value, list) else "",
)
def test_a_mistake_ends_a_command_with_one_line_and_leaves_nothing(refused: Run, argv: list[str], message: str) -> None:
    assert message in refused(*argv)


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("kind", ["gpu", "cuda", "mps"])
def test_an_accelerator_that_is_not_there_is_refused(refused: Run, kind: str) -> None:
    assert f"error: accelerator={kind}: torch finds none on this machine" in refused(f"--trainer.accelerator={kind}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {embed_dimm: 3}", "unknown setting model.embed_dimm; the nearest known one is model.embed_dim"),
        ("trainer: {max_epoch: 3}", "unknown setting trainer.max_epoch; the nearest known one is trainer.max_epochs"),
        ("model: {embed_dim: x}", "model.embed_dim=x: expected int"),
        ("model: [", "bad.yaml is not valid YAML"),
        ("just words", "bad.yaml holds no settings"),
        ("data: {class_path: DummyData, init_args: {vocab_size: 9}}", "data.vocab_size is taken from the model"),
    ],
)
def test_a_bad_yaml_is_one_line_with_the_key(refused: Run, workdir: Path, content: str, message: str) -> None:
    (workdir / "bad.yaml").write_text(content)
    assert message in refused("--config=bad.yaml")
    assert message in refused("-c", "bad.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "default.yaml is missing"),
        ("a: [", "default.yaml is not valid YAML"),
        ("trainer: {max_epoch: 1}", "max_epochs"),
    ],
)
def test_a_missing_or_broken_default_config_is_an_error(
    content: str | None, message: str, workdir: Path, refused: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm.command.settings.TrainingParser", parser.TrainingParser)  # not one that is built already
    monkeypatch.setattr(parser, "__file__", str(workdir / "slm/command/parser.py"))
    if content is not None:
        (workdir / "configs").mkdir()
        (workdir / "configs/default.yaml").write_text(content)
    assert message in refused()


def test_a_callback_that_waits_for_an_unknown_metric_is_one_line(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = "{trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val_loss}}]}}"
    with pytest.raises(SystemExit) as exit_info:
        main([*SMALL, "--config", stop])
    assert exit_info.value.code == 2
    assert re.search(r"^error: Early stopping .* `val_loss`.*`val/loss`", capsys.readouterr().err, re.M)


def test_two_commands_at_once_get_two_folders(workdir: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: claim_run(), range(40)))
    assert len(set(runs)) == 40


def test_a_run_folder_that_cannot_be_made_is_refused(refused: Run, workdir: Path) -> None:
    (workdir / "runs").write_text("a file where the folder should be")
    assert "the run folder cannot be made under" in refused(*SMALL)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_to_write_is_refused(refused: Run, workdir: Path) -> None:
    workdir.chmod(0o500)
    assert "Permission denied" in refused(*SMALL)


def test_a_traceback_is_shown_only_where_it_is_asked_for(
    slm: Run, refused: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refused("--model.embed_dim=130").startswith("error: embed_dim=130")
    monkeypatch.setenv("SLM_TRACEBACK", "1")
    with pytest.raises(InputError, match="embed_dim=130"):
        slm("--model.embed_dim=130")


def test_an_exception_that_is_a_bug_keeps_its_traceback(slm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("slm.training.language_model.LanguageModel.training_step", broken)
    with pytest.raises(ValueError, match="a bug"):
        slm(*SMALL)


@pytest.mark.parametrize("subcommand", slow_after_first(["fit", "validate", "test", "predict"]))
def test_the_settings_that_a_command_prints_it_takes_back(
    subcommand: str, slm: Run, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluates = [] if subcommand == "fit" else ["--ckpt_path=best"]
    for given in (SMALL, ["--ckpt_path=last"]):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main([subcommand, *given, "--print_config"])
        Path("printed.yaml").write_text(capsys.readouterr().out)
        with pytest.raises(SystemExit):
            main([subcommand, "--config=printed.yaml", *evaluates, "--print_config"])
        again = capsys.readouterr().out
        assert [line for line in again.splitlines() if "ckpt_path" not in line] == [
            line for line in Path("printed.yaml").read_text().splitlines() if "ckpt_path" not in line
        ]
    slm(subcommand, "--config=printed.yaml", *evaluates)


@pytest.mark.parametrize("flag", ["max_epochs=0", "max_steps=0", "limit_train_batches=0", "max_time=00:00:00:00"])
def test_a_run_in_which_nothing_is_trained_is_refused_and_leaves_nothing(flag: str, slm: Run) -> None:
    with pytest.raises(SystemExit) as exit_info:
        slm(*SMALL, f"--trainer.{flag}")
    assert exit_info.value.code == 2
    assert list(Path("runs").iterdir()) == []

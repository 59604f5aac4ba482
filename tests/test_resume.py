"""Runs that go on: which checkpoint, which folder, which settings; and models that are loaded back."""

import errno
import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_FLAGS, UNSHOWN, run_command, slow_after_first
from jsonargparse import get_loader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import slm as package
from slm import generate
from slm.cli import main
from slm.errors import InputError, NotWrittenError
from slm.run import checkpoint as checkpoints
from slm.run.checkpoint import newest_run, read_checkpoint, resolve_checkpoint
from slm.run.loading import restore_network
from slm.training.hyperparameters import TRAINING_OPTIONS, parameters_of

Run = Callable[..., str]
RUN = Path("runs/version_0")
LAST = RUN / "checkpoints/last.ckpt"
SMALL = [*SMALL_FLAGS, *UNSHOWN, "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]


def config() -> dict[str, Any]:
    return get_loader("yaml")((RUN / "config.yaml").read_text())


def steps(path: Path = LAST) -> int:
    return torch.load(path, weights_only=True)["global_step"]


def test_a_run_goes_on_with_its_own_settings_in_its_own_folder(slm: Run, trained: Path) -> None:
    before, done = config(), steps()
    output = slm("--ckpt_path", str(LAST), "--trainer.max_epochs", "4")
    assert f"{RUN} goes on from {LAST}, step {done}\n" in output
    assert steps() == 2 * done
    assert "trainer.max_epochs is now 4 (the run had 2)" in output
    assert output.count("is now") == 1
    assert [path.name for path in Path("runs").iterdir()] == ["version_0"]
    before["trainer"]["max_epochs"] = 4
    assert config() == before
    assert config()["data"]["init_args"]["seed"] == 3


def test_the_curve_goes_on_where_it_stopped(slm: Run, trained: Path) -> None:
    slm("--ckpt_path=last", "--trainer.max_epochs=4")
    events = EventAccumulator(str(RUN)).Reload()
    points = [point.step for point in events.Scalars("train/loss")]
    assert points == list(range(steps()))
    validations = [point.step for point in events.Scalars("val/loss")]
    assert len(validations) == len(set(validations)) == 4


@pytest.mark.slow
def test_the_stored_precision_is_the_one_asked_for_and_not_what_it_became(slm: Run) -> None:
    slm(*SMALL, "--trainer.max_epochs=1")
    slm("--ckpt_path=last", "--trainer.max_epochs=2")
    assert config()["trainer"]["precision"] == "16-mixed"


@pytest.mark.slow
def test_last_is_the_run_with_the_highest_number(slm: Run, trained: Path) -> None:
    shutil.copytree(trained, "runs/version_10")
    shutil.copytree(trained, "runs/version_9")
    slm("--ckpt_path=last", "--trainer.max_epochs=3")
    assert steps(Path("runs/version_10/checkpoints/last.ckpt")) > steps()


@pytest.mark.slow
def test_the_newest_run_without_a_checkpoint_starts_at_step_0_in_its_folder_with_its_settings(
    slm: Run, trained: Path
) -> None:
    newest = Path("runs/version_1")
    newest.mkdir()
    shutil.copy(trained / "config.yaml", newest)
    output = slm("--ckpt_path=last")
    assert "runs/version_1 has no checkpoint yet: it starts from step 0" in output
    assert steps(newest / "checkpoints/last.ckpt") == steps()
    assert not Path("runs/version_2").exists()


def test_a_finished_run_says_so_and_changes_nothing(slm: Run, trained: Path) -> None:
    before = LAST.read_bytes()
    output = slm("--ckpt_path=last")
    assert re.search(r"nothing was left to do: the run had already done its \d+ steps", output)
    assert "--trainer.max_epochs 4" in output
    assert LAST.read_bytes() == before


def test_a_copied_checkpoint_with_nothing_left_to_do_is_refused_and_leaves_no_run(
    slm: Run, refused: Run, trained: Path, workdir: Path
) -> None:
    shutil.copy(LAST, workdir / "copy.ckpt")
    message = refused("--ckpt_path=copy.ckpt", "--trainer.max_epochs=2")
    assert re.search(r"copy.ckpt has done its \d+ steps: ask for more of them", message)
    assert [path.name for path in Path("runs").iterdir()] == ["version_0"]


@pytest.mark.slow
def test_a_flag_wins_over_the_stored_value_in_what_is_trained_too(slm: Run, trained: Path) -> None:
    output = slm("--ckpt_path=last", "--trainer.max_epochs=3", "--model.learning_rate=0.0005")
    assert "model.learning_rate is now 0.0005 (the run had 0.001)" in output
    stored = torch.load(LAST, weights_only=True)
    assert stored["optimizer_states"][0]["param_groups"][0]["lr"] == 0.0005
    assert stored["hyper_parameters"]["learning_rate"] == 0.0005
    assert config()["model"]["learning_rate"] == 0.0005


@pytest.mark.parametrize("change", ["embed_dim=32", "num_heads=4", "vocab_size=30", "max_seq_len=8", "optimizer=sgd"])
def test_a_flag_that_the_weights_cannot_follow_is_refused_with_both_values(
    trained: Path, refused: Run, change: str
) -> None:
    before = (RUN / "config.yaml").read_bytes()
    name = change.partition("=")[0]
    stored = read_checkpoint(LAST)["hyper_parameters"][name]
    message = refused("--ckpt_path=last", f"--model.{change}")
    assert f"{change} cannot apply to a checkpoint trained with {name}={stored}" in message
    assert (RUN / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trainer.max_epochs=4"], "short_context_steps=999 must be below the run's own number of steps"),
        (["--trainer.max_epochs=-1"], "need an end: give --trainer.max_epochs"),
    ],
)
def test_what_is_refused_when_a_run_goes_on_is_not_kept(
    trained: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in (LAST, RUN / "config.yaml")}
    with pytest.raises(SystemExit) as exit_info:
        main(["--ckpt_path=last", "--model.short_context_steps=999", *flags])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


def test_a_checkpoint_copied_away_brings_model_and_data_settings_with_it(slm: Run, trained: Path) -> None:
    done = steps()
    shutil.copy(LAST, "copy.ckpt")
    shutil.rmtree("runs")
    output = slm("--ckpt_path=copy.ckpt", "--trainer.max_epochs=3", "--trainer.enable_progress_bar=false")
    assert "is now" not in output
    assert steps() == done // 2 * 3
    assert config()["model"]["embed_dim"] == 16
    assert config()["data"]["class_path"] == "slm.data.DummyData"
    assert config()["data"]["init_args"]["seed"] == 3


@pytest.mark.slow
def test_a_moved_run_keeps_its_best_score(slm: Run, trained: Path) -> None:
    slm("--ckpt_path=last", "--trainer.max_epochs=3")
    best = (RUN / "checkpoints/best.ckpt").read_bytes()
    shutil.move("runs", "elsewhere")
    slm("--ckpt_path=elsewhere/version_0", "--trainer.max_epochs=4", "--model.learning_rate=1")
    assert Path("elsewhere/version_0/checkpoints/best.ckpt").read_bytes() == best


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), NotWrittenError("elsewhere/my.ckpt: out of luck")])
def test_an_exception_leaves_a_last_checkpoint(error: Exception, slm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    original = package.LanguageModel.training_step

    def fails_at_step_3(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 3:
            raise error
        return original(self, batch, batch_idx)

    monkeypatch.setattr("slm.training.language_model.LanguageModel.training_step", fails_at_step_3)
    with pytest.raises((RuntimeError, SystemExit)):
        slm(*SMALL, "--data.batch_size=8")
    assert steps() == 3
    assert not (RUN / "checkpoints/best.ckpt").exists()


@pytest.mark.slow
def test_a_run_killed_after_a_validation_within_an_epoch_goes_on_from_there(workdir: Path) -> None:
    code = (
        "import os, sys\n"
        "from slm.cli import main\n"
        "from slm.training.language_model import LanguageModel\n"
        "original = LanguageModel.training_step\n"
        "def step(self, batch, batch_idx):\n"
        "    if self.global_step == 9: os._exit(9)\n"
        "    return original(self, batch, batch_idx)\n"
        "LanguageModel.training_step = step\n"
        "main(sys.argv[1:])\n"
    )
    flags = [*SMALL, "--data.batch_size=8", "--trainer.val_check_interval=0.5"]
    assert run_command("-c", code, *flags, cwd=workdir).returncode == 9
    assert steps() == 7
    curves = EventAccumulator(str(workdir / RUN)).Reload()
    assert [point.step for point in curves.Scalars("train/loss")][:7] == list(range(7))
    assert [point.step for point in curves.Scalars("val/loss")] == [6]


@pytest.mark.slow
def test_without_last_the_run_goes_on_from_its_best_and_says_so(slm: Run, trained: Path) -> None:
    best = RUN / "checkpoints/best.ckpt"
    LAST.unlink()
    output = slm("--ckpt_path=last", "--trainer.max_epochs=3")
    assert f"{RUN} goes on from {best}" in output
    assert steps() == 12


@pytest.mark.slow
def test_text_is_found_again_from_another_folder(slm: Run, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workdir / "mine.txt").write_text("the cat sat on the mat. " * 200)
    text = ["--data=TextData", "--model.vocab_size=256", "--data.path=mine.txt"]
    small = [flag for flag in SMALL if "vocab_size" not in flag and "num_tokens" not in flag]
    slm(*text, *small, "--trainer.max_epochs=1")
    assert read_checkpoint(LAST)["tokenizer"] == "bytes"
    (workdir / "elsewhere").mkdir()
    monkeypatch.chdir(workdir / "elsewhere")
    slm("--ckpt_path=../runs/version_0", "--trainer.max_epochs=2")
    slm("validate", "--ckpt_path=../runs/version_0")
    assert read_checkpoint(workdir / LAST)["epoch"] == 2


@pytest.mark.slow
def test_after_max_time_the_report_offers_more_time(slm: Run) -> None:
    output = slm(*SMALL, "--trainer.max_epochs=100000", "--trainer.max_time=00:00:00:01")
    flags = re.search(r"^go longer .*--ckpt_path \S+ (--trainer.max_time \S+)$", output, re.M)[1]  # type: ignore[index]
    done = steps()
    slm("--ckpt_path=last", *flags.split())
    assert steps() > done


@pytest.mark.parametrize("stops", slow_after_first([[20], [20, 30], [55], [56, 60], [28, 56]]))
def test_an_epoch_that_max_steps_cut_short_is_finished_and_not_counted(slm: Run, stops: list[int]) -> None:
    flags = [*SMALL, "--data.batch_size=4", "--trainer.max_epochs=3"]
    for stop in stops:
        slm(*flags, f"--trainer.max_steps={stop}")
        flags = ["--ckpt_path=last"]
    slm("--ckpt_path=last", "--trainer.max_steps=-1")
    assert steps() == 3 * 28
    assert torch.load(LAST, weights_only=True)["epoch"] == 3


@pytest.mark.slow
def test_last_is_looked_for_where_the_runs_are(slm: Run, trained: Path) -> None:
    slm(*SMALL, "--trainer.max_epochs=1", "--trainer.default_root_dir=out")
    before = LAST.read_bytes()
    slm("--ckpt_path=last", "--trainer.default_root_dir=out", "--trainer.max_epochs=2")
    there = Path("out/runs/version_0/checkpoints/last.ckpt")
    assert torch.load(there, weights_only=True)["epoch"] == 2
    Path("there.yaml").write_text("trainer: {default_root_dir: out}\n")
    slm("--config=there.yaml", "--ckpt_path=last", "--trainer.max_epochs=3")
    assert torch.load(there, weights_only=True)["epoch"] == 3
    assert LAST.read_bytes() == before


def test_a_checkpoint_is_read_once_and_not_kept_in_memory(
    slm: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    whole = checkpoints.read_checkpoint

    def counted(path: Path) -> dict[str, Any]:
        read.append(path)
        return whole(path)

    class Content(dict[str, Any]):
        """A dictionary of which it can be told when it is gone."""

    alive: list[Any] = []

    def watched(path: Path) -> Any:
        content = Content(counted(path))
        alive.append(weakref.ref(content))
        return content

    monkeypatch.setattr(checkpoints, "read_checkpoint", watched)
    during: list[bool] = []
    step = package.LanguageModel.training_step

    def noting(self: Any, *batch: Any) -> Any:
        gc.collect()
        during.append(alive[0]() is None)
        return step(self, *batch)

    monkeypatch.setattr("slm.training.language_model.LanguageModel.training_step", noting)
    slm("--ckpt_path=last", "--trainer.max_epochs=3")
    assert [path.name for path in read] == ["last.ckpt"]  # and the best one by the command line
    assert during
    assert all(during)


@pytest.mark.parametrize(
    ("folder", "path"), slow_after_first([("checkpoints", "last.ckpt"), (".", "checkpoints/last.ckpt"), (".", ".")])
)
def test_a_run_goes_on_in_its_folder_from_inside_it_too(
    slm: Run, trained: Path, monkeypatch: pytest.MonkeyPatch, folder: str, path: str
) -> None:
    last = LAST.absolute()
    monkeypatch.chdir(RUN / folder)
    slm(f"--ckpt_path={path}", "--trainer.max_epochs=3")
    assert torch.load(last, weights_only=True)["epoch"] == 3


# ---- evaluation


def table(output: str, name: str) -> float:
    """The metric in Lightning's table, which is drawn in two ways: with `rich` installed, and without."""
    return float(re.search(rf"{name}[ │]+([\d.]+)", output)[1])  # type: ignore[index]


def test_validate_and_test_measure_every_held_out_window_of_the_best_checkpoint(slm: Run) -> None:
    report = slm(*SMALL, "--trainer.max_epochs=2", "--data.batch_size=2", "--trainer.limit_val_batches=2")
    partial = float(re.search(r"val/loss +([\d.]+)", report)[1])  # type: ignore[index]
    validated, tested = slm("validate", "--ckpt_path=best"), slm("test", "--ckpt_path=runs/version_0")
    assert "validate: the held-out split, 12 windows of 16 tokens" in validated
    assert "test: the held-out split, 12 windows of 16 tokens" in tested
    assert "only the first 2 of its 6 batches" in slm("validate", "--ckpt_path=best", "--trainer.limit_val_batches=2")
    assert table(validated, "val/loss") == table(tested, "test/loss") != pytest.approx(partial, abs=1e-3)
    assert table(validated, "val/optimum") == table(tested, "test/optimum") > 0
    assert [path.name for path in Path("runs").iterdir()] == ["version_0"]


@pytest.mark.slow
def test_an_evaluation_equals_the_closing_report_and_leaves_the_run_as_it_was(slm: Run) -> None:
    report = slm(*(flag for flag in SMALL if flag not in UNSHOWN), "--trainer.max_epochs=2")
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    for checkpoint in ("best", "runs/version_0/simple_language_model.pt"):
        loss = table(slm("validate", f"--ckpt_path={checkpoint}"), "val/loss")
        assert f"val/loss    {loss:.3f}," in report
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_predict_prints_the_greedy_next_token_of_each_held_out_window(slm: Run, trained: Path) -> None:
    output = slm("predict", "--ckpt_path=best").splitlines()
    lines = [line for line in output if line.isdigit()]
    assert [*lines, "predict: runs/version_0/checkpoints/best.ckpt"] == output
    data = package.data.DummyData(20, 16, num_tokens=2000, seed=3)
    data.setup()
    assert data.val_windows is not None
    tokens = torch.stack([data.val_windows[k][0] for k in range(len(data.val_windows))])
    assert [int(line) for line in lines] == package.load("best")(tokens)[:, -1].argmax(-1).tolist()


def test_what_best_stands_for_is_said_beside_what_is_written(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    generate.main(["--ckpt_path=best", "--prompt=5", "--max_new_tokens=2"])
    assert capsys.readouterr().err == "best is runs/version_0/checkpoints/best.ckpt\n"


# ---- loading


@pytest.mark.parametrize("path", ["best", "last", "runs/version_0", str(LAST), f"{RUN}/simple_language_model.pt"])
def test_load_gives_the_model_back_in_eval_mode(trained: Path, path: str) -> None:
    model = package.load(path)
    assert not model.training
    stored = read_checkpoint(LAST if path in ("last", str(LAST)) else RUN / "checkpoints/best.ckpt")
    expected = stored["state_dict"]["transformer.token_embedding.weight"]
    assert torch.equal(model.transformer.token_embedding.weight, expected)
    assert model.hparams["embed_dim"] == 16


def test_loading_draws_nothing_from_the_random_numbers_of_its_caller(trained: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    package.load("best")
    assert torch.equal(torch.rand(3), expected)


def test_the_weights_file_is_a_plain_dictionary_of_the_best_weights(trained: Path) -> None:
    content = torch.load(RUN / "simple_language_model.pt", weights_only=True)
    assert set(content) == {"hyper_parameters", "model_class", "state_dict", "tokenizer"}
    assert content["tokenizer"] is None
    best = read_checkpoint(RUN / "checkpoints/best.ckpt")["state_dict"]
    assert {f"transformer.{name}" for name in content["state_dict"]} == set(best)
    assert all(torch.equal(value, best[f"transformer.{name}"]) for name, value in content["state_dict"].items())


@pytest.mark.slow
def test_the_weights_file_is_written_for_a_new_best_alone(slm: Run, trained: Path) -> None:
    before = (RUN / "simple_language_model.pt").read_bytes()
    slm("--ckpt_path=last", "--trainer.max_epochs=3", "--model.learning_rate=1")
    assert (RUN / "simple_language_model.pt").read_bytes() == before


# ---- refused


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_truncated_checkpoint_is_refused_with_its_path(trained: Path, refused: Run, keep: int) -> None:
    Path("cut.ckpt").write_bytes(LAST.read_bytes()[:keep])
    assert "cut.ckpt is damaged or not a checkpoint" in refused("--ckpt_path=cut.ckpt")


def test_a_foreign_file_is_refused(refused: Run, workdir: Path) -> None:
    (workdir / "notes.txt").write_text("not a checkpoint")
    assert "notes.txt is damaged or not a checkpoint" in refused("--ckpt_path=notes.txt")
    torch.save({"weights": torch.zeros(3)}, workdir / "other.pt")
    assert "other.pt is not a checkpoint of this project" in refused("--ckpt_path=other.pt")
    torch.save([1, 2], workdir / "list.pt")
    assert "list.pt is not a checkpoint of this project" in refused("validate", "--ckpt_path=list.pt")


def test_a_file_that_would_run_code_is_refused_without_running_it(refused: Run, workdir: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (Path("ran"),))

    torch.save({"hyper_parameters": {}, "state_dict": Malicious()}, workdir / "bad.ckpt")
    assert "bad.ckpt is damaged or not a checkpoint" in refused("--ckpt_path=bad.ckpt")
    assert not Path("ran").exists()


def test_a_run_cannot_go_on_from_bare_weights(trained: Path, refused: Run) -> None:
    message = refused(f"--ckpt_path={RUN}/simple_language_model.pt")
    assert "holds weights alone" in message


@pytest.mark.parametrize(
    "change", ["seed=5", "num_tokens=3000", "source=uniform", "val_fraction=0.2", "shift_windows=True"]
)
def test_a_run_is_not_led_on_with_other_data(trained: Path, refused: Run, change: str) -> None:
    name, _, value = change.partition("=")
    assert f"data.{name}={value} cannot apply to a run" in refused("--ckpt_path=last", f"--data.{change}")


def test_an_option_that_the_run_did_not_know_yet_had_its_default_there(trained: Path, slm: Run, refused: Run) -> None:
    config = RUN / "config.yaml"
    config.write_text(re.sub("^ +(shift_windows|short_context_steps): .*\n", "", config.read_text(), flags=re.M))
    message = "data.shift_windows=True cannot apply to a run that was trained with False"
    assert message in refused("--ckpt_path=last", "--data.shift_windows=true")
    output = slm("--ckpt_path=last", "--model.short_context_steps=1", "--trainer.max_epochs=3")
    assert "model.short_context_steps is now 1 (the run had 0)" in output


def test_other_data_is_taken_where_that_is_meant_and_then_the_best_is_forgotten(slm: Run, trained: Path) -> None:
    output = slm("--ckpt_path=last", "--data.seed=5", "--allow_changed_data=true", "--trainer.max_epochs=3")
    assert "data.seed is now 5 (the run had 3)" in output
    assert "allow_changed_data" not in (RUN / "config.yaml").read_text()
    best = read_checkpoint(RUN / "checkpoints/best.ckpt")
    assert (best["epoch"], best["global_step"]) == (3, steps())
    [kept] = [state for key, state in best["callbacks"].items() if key.startswith("BestCheckpoint")]
    assert best["lr_schedulers"][0]["best"] == pytest.approx(kept["best_model_score"].item())
    assert f"val/loss    {table(slm('validate', '--ckpt_path=best'), 'val/loss'):.3f}," in output
    slm("--ckpt_path=last", "--trainer.max_epochs=4")


@pytest.fixture
def text_run(slm: Run, workdir: Path) -> Path:
    """A run on a text file of its own; returns the file."""
    text = workdir / "mine.txt"
    text.write_text("the cat sat on the mat. " * 200)
    small = [flag for flag in SMALL if "vocab_size" not in flag and "num_tokens" not in flag]
    slm("--data=TextData", "--model.vocab_size=256", f"--data.path={text}", *small, "--trainer.max_epochs=1")
    return text


def test_a_text_that_has_changed_is_refused_with_both_fingerprints(text_run: Path, refused: Run) -> None:
    before = read_checkpoint(LAST)["fingerprint"]
    text_run.write_text(text_run.read_text().replace("cat", "dog", 1))
    message = refused("--ckpt_path=last", "--trainer.max_epochs=2")
    assert re.search(rf"the data is not what {LAST} was trained on: .* is \w{{32}}, the run had {before};", message)
    assert "--allow_changed_data true" in message


@pytest.mark.slow
def test_a_text_that_has_changed_is_taken_where_that_is_meant(slm: Run, text_run: Path) -> None:
    before = read_checkpoint(LAST)["fingerprint"]
    text_run.write_text(text_run.read_text() * 2)
    slm("--ckpt_path=last", "--trainer.max_epochs=2", "--allow_changed_data=true")
    assert read_checkpoint(LAST)["fingerprint"] != before
    assert read_checkpoint(LAST)["position"]["epoch"] == 2
    slm("--ckpt_path=last", "--trainer.max_epochs=3")


@pytest.mark.slow
def test_a_text_that_has_changed_can_be_evaluated(slm: Run, text_run: Path) -> None:
    text_run.write_text("something else altogether. " * 100)
    assert "val/loss" in slm("validate", "--ckpt_path=best")


@pytest.mark.slow
def test_with_more_text_an_interrupted_epoch_begins_anew(slm: Run, text_run: Path) -> None:
    slm("--ckpt_path=last", "--trainer.max_epochs=2", f"--trainer.max_steps={steps() + 2}")
    done = read_checkpoint(LAST)
    assert done["position"]["batch"] == 2
    text_run.write_text(text_run.read_text() * 2)
    slm("--ckpt_path=last", "--trainer.max_steps=-1", "--allow_changed_data=true")
    windows = (2 * 4800 - 1) // 16
    batches = -(-(windows - round(windows * 0.1)) // 32)
    assert read_checkpoint(LAST)["global_step"] == done["global_step"] + batches


@pytest.mark.slow
def test_another_part_held_out_is_other_data(slm: Run, trained: Path) -> None:
    slm("--ckpt_path=last", "--data.val_fraction=0.3", "--allow_changed_data=true", "--trainer.max_epochs=3")
    assert read_checkpoint(RUN / "checkpoints/best.ckpt")["position"]["epoch"] == 3


def test_an_evaluation_does_not_ignore_the_permission_for_other_data(trained: Path, refused: Run) -> None:
    assert "leave out --allow_changed_data" in refused("validate", "--ckpt_path=best", "--allow_changed_data=true")


@pytest.mark.slow
def test_a_resumed_run_sweeps_what_a_kill_left(slm: Run, trained: Path) -> None:
    for name in ("config.yaml.unfinished", "checkpoints/last.ckpt.unfinished"):
        (RUN / name).write_text("half")
    slm("--ckpt_path=last", "--trainer.max_epochs=3")
    assert list(RUN.rglob("*.unfinished")) == []


def test_another_learning_rate_is_the_schedules_too(slm: Run, trained: Path) -> None:
    slm("--ckpt_path=last", "--trainer.max_epochs=3", "--model.learning_rate=0.0005")
    content = read_checkpoint(LAST)
    assert content["lr_schedulers"][0]["_last_lr"] == [0.0005, 0.0005]
    assert [group["lr"] for group in content["optimizer_states"][0]["param_groups"]] == [0.0005, 0.0005]


def test_a_copied_checkpoint_does_not_choose_what_code_is_imported(
    trained: Path, refused: Run, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workdir / "evil.py").write_text("open('ran', 'w')\n")
    monkeypatch.syspath_prepend(str(workdir))
    content = torch.load(LAST, weights_only=True)
    content["data"]["class_path"] = "evil.Data"
    torch.save(content, "copy.ckpt")
    assert "copy.ckpt does not say what data of ours" in refused("validate", "--ckpt_path=copy.ckpt")
    assert not Path("ran").exists()


def test_a_state_that_could_not_be_read_again_is_refused_when_it_is_saved(
    slm: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("slm.run.callbacks.LastCheckpoint.state_dict", lambda self: {"path": Path("somewhere")})
    with pytest.raises(SystemExit) as exit_info:
        slm(*SMALL)
    assert exit_info.value.code == 2
    said = capsys.readouterr().err
    assert re.search(r"error: .*best.ckpt would hold pathlib\S+Path and could not be read again", said)


@pytest.mark.slow
def test_another_batch_size_is_no_other_data(slm: Run, trained: Path) -> None:
    assert "data.batch_size is now 8" in slm("--ckpt_path=last", "--data.batch_size=8", "--trainer.max_epochs=3")


@pytest.mark.slow
def test_bare_weights_without_their_run_are_evaluated_on_data_that_is_named(
    slm: Run, trained: Path, refused: Run
) -> None:
    expected = table(slm("validate", "--ckpt_path=best"), "val/loss")
    shutil.copy(RUN / "simple_language_model.pt", "copy.pt")
    assert "copy.pt does not say what data of ours it was trained on" in refused("validate", "--ckpt_path=copy.pt")
    flags = ["--data=DummyData", "--data.num_tokens=2000", "--data.seed=3", "--trainer.precision=32-true"]
    assert table(slm("validate", "--ckpt_path=copy.pt", *flags), "val/loss") == expected


@pytest.mark.slow
def test_a_checkpoint_is_not_evaluated_on_data_of_another_tokenizer(slm: Run, refused: Run) -> None:
    small = [flag for flag in SMALL if "vocab_size" not in flag]
    slm(*small, "--model.vocab_size=256", "--trainer.max_epochs=1")
    message = refused("validate", "--ckpt_path=best", "--data=TextData")
    assert "was trained with tokenizer=None, the data has tokenizer=bytes" in message


def test_weights_that_do_not_fit_are_refused(trained: Path, refused: Run) -> None:
    content = torch.load(RUN / "simple_language_model.pt", weights_only=True)
    del content["state_dict"]["final_norm.weight"]
    torch.save(content, "part.pt")
    assert "part.pt does not fit this version" in refused("validate", "--ckpt_path=part.pt", "--data=DummyData")
    with pytest.raises(InputError, match=r"part.pt does not fit this version"):
        package.load("part.pt")


def test_an_option_that_is_not_known_here_is_refused_where_the_network_alone_is_read(trained: Path) -> None:
    assert parameters_of(package.LanguageModel).keys() == TRAINING_OPTIONS
    content = torch.load(RUN / "simple_language_model.pt", weights_only=True)
    content["hyper_parameters"]["window"] = 64
    with pytest.raises(InputError, match=r"new.pt does not fit this version of the model: .*'window'"):
        restore_network(Path("new.pt"), content)


@pytest.mark.parametrize("hparams", [{"lr": 1.0}, [1], {"vocab_size": torch.zeros(1)}])
def test_a_checkpoint_of_another_program_is_called_so(refused: Run, workdir: Path, hparams: Any) -> None:
    torch.save({"hyper_parameters": hparams, "state_dict": {}, "optimizer_states": []}, workdir / "other.ckpt")
    for subcommand in ("fit", "validate"):
        assert "other.ckpt is not a checkpoint of this project" in refused(subcommand, "--ckpt_path=other.ckpt")


def test_a_stray_config_beside_a_copied_checkpoint_is_not_taken_for_its_runs(slm: Run, trained: Path) -> None:
    Path("other").mkdir()
    shutil.copy(LAST, "other/mine.ckpt")
    Path("other/config.yaml").write_text("name: my project\n")
    assert "val/loss" in slm("validate", "--ckpt_path=other/mine.ckpt")


def test_settings_that_cannot_be_written_are_refused(
    slm: Run, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (RUN / "config.yaml.unfinished").mkdir()
    with pytest.raises(SystemExit) as exit_info:
        slm("--ckpt_path=last", "--trainer.max_epochs=3")
    assert exit_info.value.code == 2
    assert f"error: {RUN}/config.yaml cannot be written: Is a directory" in capsys.readouterr().err


def test_a_folder_without_a_checkpoint_is_refused(refused: Run, workdir: Path) -> None:
    (workdir / "empty").mkdir()
    assert "empty/checkpoints/last.ckpt: there is no such checkpoint" in refused("--ckpt_path=empty")


def test_damaged_settings_of_a_run_are_refused(trained: Path, refused: Run) -> None:
    (RUN / "config.yaml").write_text("model: [")
    assert "config.yaml is not valid YAML" in refused("validate", "--ckpt_path=best")
    assert "config" in refused("--ckpt_path=last")


def test_asking_for_fewer_epochs_than_are_done_is_refused_with_both_numbers(trained: Path, refused: Run) -> None:
    message = refused("--ckpt_path=last", "--trainer.max_epochs=1")
    assert "trainer.max_epochs=1 is less than the 2 epochs that the run has done" in message


def test_a_checkpoint_path_is_resolved_alike_everywhere(trained: Path) -> None:
    assert newest_run() == RUN
    assert resolve_checkpoint("last") == LAST
    assert resolve_checkpoint("runs/version_0", prefer="best") == RUN / "checkpoints/best.ckpt"
    assert resolve_checkpoint(LAST) == LAST
    with pytest.raises(InputError, match="there is no run under"):
        newest_run(Path("elsewhere"))


@pytest.mark.parametrize("asked", ["best", "last"])
def test_where_nothing_is_to_be_trained_the_newest_run_that_has_such_a_checkpoint_is_meant(
    asked: str, trained: Path, slm: Run
) -> None:
    Path("runs/version_1").mkdir()
    said = slm("validate", f"--ckpt_path={asked}")
    assert f"runs/version_1 has no checkpoints/{asked}.ckpt: {RUN} is the newest run that has one" in said
    assert said.count("runs/version_1") == 1


def test_without_any_such_checkpoint_that_is_said(workdir: Path, refused: Run) -> None:
    Path("runs/version_0").mkdir(parents=True)
    assert "has checkpoints/best.ckpt: train one longer" in refused("validate", "--ckpt_path=best")


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_gone_on_on_and_named(
    code: int, slm: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("slm.durable.fcntl.lockf", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    Path("a.txt").write_text("one two three " * 200)
    small = [flag for flag in SMALL if "num_tokens" not in flag]
    said = slm(*small, "--data=TextData", "--data.path=a.txt", "--model.vocab_size=256", "--trainer.max_steps=1")
    assert f"cache/slm cannot be locked ({os.strerror(code)})" in said
    assert f"{RUN} cannot be locked ({os.strerror(code)}): let nothing else write there at the same time" in said
    assert LAST.is_file()


@pytest.mark.slow
def test_whatever_goes_wrong_before_the_first_step_leaves_no_run(slm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    for place in (
        "slm.run.folder.hold",
        "slm.run.folder.begin",
        "slm.cli.new_trainer",
        "slm.training.language_model.LanguageModel.setup",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, fail)
            with pytest.raises(KeyError):
                slm(*SMALL)
        assert list(Path("runs").iterdir()) == [], place


def test_a_signal_before_the_first_step_leaves_no_run(slm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("slm.run.folder.begin", "slm.cli.new_trainer"):
        with monkeypatch.context() as patch:
            patch.setattr(place, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(SystemExit) as exit_info:
                slm(*SMALL)
        assert exit_info.value.code == 128 + signal.SIGTERM
        assert list(Path("runs").iterdir()) == [], place


@pytest.mark.slow
def test_a_run_that_another_process_trains_is_left_alone(trained: Path, refused: Run) -> None:
    code = "import time; from pathlib import Path; from slm.run.folder import hold; held = hold(Path())"
    command = [sys.executable, "-c", f"{code}; print(1, flush=True); time.sleep(100)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=trained) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"1\n"
        message = refused("--ckpt_path=last", "--trainer.max_epochs=3")
        other.kill()
    assert "runs/version_0 is being trained by another process: stop that first" in message


@pytest.mark.slow
def test_a_text_that_was_moved_is_known_by_its_content(slm: Run, text_run: Path) -> None:
    moved = text_run.rename(text_run.with_name("moved.txt"))
    slm("--ckpt_path=last", "--trainer.max_epochs=2", f"--data.path={moved}")
    assert read_checkpoint(LAST)["position"]["epoch"] == 2


@pytest.mark.slow
def test_the_bar_of_a_resumed_run_begins_inside_its_epoch(slm: Run) -> None:
    flags = [flag for flag in SMALL if "progress_bar" not in flag]
    slm(*flags, "--data.batch_size=4", "--trainer.max_epochs=1", "--trainer.max_steps=20")
    lines = re.split(r"[\r\n]", slm("--ckpt_path=last", "--trainer.max_steps=-1"))
    counts = [int(match[1]) for match in (re.match(r"Epoch 0:.* (\d+)/28 ", line) for line in lines) if match]
    assert {0, 28} <= set(counts) <= {0, *range(20, 29)}

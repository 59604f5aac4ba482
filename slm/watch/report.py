"""What a run reached, and how to go on: the closing report."""

import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from slm.data.token_data import TokenData
from slm.watch.tensorboard import FIGURE


def closing_report(
    trainer: Trainer, data: TokenData, metrics: Mapping[str, Any], run: Path | None, command: str
) -> str:
    """What a run reached, the best that is possible, where everything is, and how to go on.

    Args:
        trainer: after `fit`.
        data: what it was trained on.
        metrics: the validation of the best checkpoint, else the last one of the run.
        run: its folder; None where nothing was kept.
        command: what starts the command line, without arguments.
    """
    is_best = run is not None and (run / "checkpoints" / "best.ckpt").is_file()
    source = " (best.ckpt)" if is_best else " (last validation)"
    lines = [*_reached(trainer, data, metrics, source), *_kept(trainer, run, command)]
    return "\n".join(f"{name:<12}{text}" for name, text in lines)


def _reached(trainer: Trainer, data: TokenData, metrics: Mapping[str, Any], source: str) -> Iterator[tuple[str, str]]:
    if "val/loss" not in metrics:
        yield "val/loss", "none: nothing was validated"
        return
    used, there = sum(trainer.num_val_batches), len(data.val_dataloader())
    flag = "overfit_batches" if trainer.overfit_batches else "limit_val_batches"  # type: ignore[attr-defined]
    partial = "" if used >= there else f" (on {used} of {there} batches: {flag}={getattr(trainer, flag)})"
    known = {"optimum": data.optimum, "unigram": data.unigram}
    facts = [f"{name} {value:.3f}" for name, value in known.items() if value is not None]
    yield "val/loss", ", ".join([f"{metrics['val/loss']:.3f}", *facts]) + partial + source
    yield "perplexity", f"{metrics['val/perplexity']:.2f}"
    ceiling = "" if data.best_accuracy is None else f", at best {data.best_accuracy:.3f}"
    yield "accuracy", f"{metrics['val/accuracy']:.3f}{ceiling}"
    if "val/bits_per_byte" in metrics:
        yield "bits/byte", f"{metrics['val/bits_per_byte']:.3f}"


def _kept(trainer: Trainer, run: Path | None, command: str) -> Iterator[tuple[str, str]]:
    if run is None:
        yield "run", "not kept: fast_dev_run leaves no folder, no curves and no checkpoints"
        return
    yield "run", str(run)
    checkpoints = {name: run / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")}
    for name, path in checkpoints.items():
        yield name, str(path) if path.is_file() else "none"
    if (run / FIGURE).is_file():
        yield "losses", str(run / FIGURE)
    python = shlex.split(command)[0]
    if any(path.is_file() for path in checkpoints.values()):
        yield "look inside", shlex.join([python, "-m", "slm.look", "--ckpt_path", str(run)])
    if any(run.glob("events.out.tfevents.*")):
        yield "see curves", shlex.join([python, "-m", "tensorboard.main", "--logdir", str(run.parent)])
    else:
        yield "see curves", "none: TensorBoard's logger is off"
    if checkpoints["last"].is_file():
        resume = f"{command} --ckpt_path {shlex.quote(str(checkpoints['last']))}"
        yield "resume", resume
        timer = next((callback for callback in trainer.callbacks if isinstance(callback, Timer)), None)  # type: ignore[attr-defined]
        if 0 < trainer.max_steps <= trainer.global_step:
            yield "go longer", f"{resume} --trainer.max_steps {2 * trainer.global_step}"
        elif timer is not None and (timer.time_remaining() or 0) <= 0:
            minutes, seconds = divmod(math.ceil(2 * timer.time_elapsed()), 60)
            hours, minutes = divmod(minutes, 60)
            days, hours = divmod(hours, 24)
            yield "go longer", f"{resume} --trainer.max_time {days:02}:{hours:02}:{minutes:02}:{seconds:02}"
        elif trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch:
            yield "go longer", f"{resume} --trainer.max_epochs {2 * trainer.current_epoch}"
        else:
            yield "stopped", f"early, at step {trainer.global_step}, by a callback"


def evaluated(trainer: Trainer, data: TokenData, subcommand: str) -> str:
    """On what `validate` or `test` was done."""
    assert data.val_windows is not None
    used = sum(trainer.num_val_batches if subcommand == "validate" else trainer.num_test_batches)
    there = len(data.val_dataloader())
    part = "" if used >= there else f", only the first {used} of its {there} batches"
    windows = f"{len(data.val_windows)} windows of {data.val_windows.seq_len} tokens"
    return f"{subcommand}: the held-out split, {windows}{part}"

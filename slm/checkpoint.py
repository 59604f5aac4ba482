"""Checkpoints: how they are found, read and kept, and what makes one whole.

A run is one folder, `runs/version_N/`, with `checkpoints/best.ckpt`, `checkpoints/last.ckpt` and the best weights as a
plain dictionary in `simple_language_model.pt`.
"""

import inspect
import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from slm.errors import InputError, check
from slm.transformer import Transformer

RUNS = Path("runs")
WEIGHTS_NAME = "simple_language_model.pt"


def newest_run(runs: Path = RUNS) -> Path:
    """The run folder with the highest `version_N`; raises InputError where there is none."""
    numbers = _run_numbers(runs)
    check(bool(numbers), f"there is no run under {runs.absolute()}: start one with `python train.py`, or give a path")
    return runs / f"version_{max(numbers)}"


def claim_run(runs: Path = RUNS) -> Path:
    """Make and return the next run folder; two processes at once get two folders.

    Raises:
        InputError: the folder cannot be made.
    """
    try:
        runs.mkdir(parents=True, exist_ok=True)
        while True:
            run = runs / f"version_{max(_run_numbers(runs), default=-1) + 1}"
            try:
                run.mkdir()
            except FileExistsError:
                continue
            return run
    except OSError as error:
        raise InputError(
            f"the run folder cannot be made under {runs.absolute()}: {error.strerror}; "
            "start the command in a folder that you can write to"
        ) from error


def _run_numbers(runs: Path) -> list[int]:
    names = [path.name.removeprefix("version_") for path in runs.glob("version_*") if path.is_dir()]
    return [int(name) for name in names if name.isdigit()]


def resolve_checkpoint(ckpt_path: str | Path, prefer: str = "last", runs: Path = RUNS) -> Path:
    """The file that `ckpt_path` means, whether or not it is there yet.

    Args:
        ckpt_path: `last` or `best`, of the newest run; a run folder; or a `.ckpt` or `.pt` file.
        prefer: which checkpoint of a run folder is meant, `last` or `best`; the other where that is not there.
        runs: where run folders are looked for.

    Raises:
        InputError: there is no such run, folder or file.
    """
    if str(ckpt_path) == "best":
        return newest_run(runs) / "checkpoints" / "best.ckpt"
    path = newest_run(runs) if str(ckpt_path) == "last" else Path(ckpt_path)
    check(path.exists(), f"ckpt_path={ckpt_path}: there is no such file; give last, best, a run folder or a checkpoint")
    if not path.is_dir():
        return path
    kept = path / "checkpoints"
    preferred = kept / ("last.ckpt" if str(ckpt_path) == "last" else f"{prefer}.ckpt")
    return next((file for file in (preferred, kept / "last.ckpt", kept / "best.ckpt") if file.is_file()), preferred)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A `.ckpt` or `.pt` file as a dictionary with `hyper_parameters` and `state_dict`, on the CPU; runs no code in it.

    Raises:
        InputError: the file is missing, damaged, or not a checkpoint of this project.
    """
    check(path.is_file(), f"{path}: there is no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} is damaged or not a checkpoint: torch.load refuses it") from error
    known = isinstance(content, dict) and {"hyper_parameters", "state_dict"} <= content.keys()
    check(known, f"{path} is not a checkpoint of this project: it has no hyper_parameters and state_dict")
    hparams, sizes = content["hyper_parameters"], inspect.signature(Transformer).parameters.keys()
    known = isinstance(hparams, dict) and all(isinstance(hparams.get(name), int | float) for name in sizes)
    check(known, f"{path} is not a checkpoint of this project: its hyper_parameters do not give {', '.join(sizes)}")
    return content


def load_weights(transformer: Transformer, content: dict[str, Any], path: Path) -> None:
    """Load the weights in the content of a `.ckpt` or a `.pt`; raises InputError where they do not fit."""
    state = {name.removeprefix("transformer."): value for name, value in content["state_dict"].items()}
    try:
        transformer.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{path} does not fit this version of the model: {error}") from error


class SelfContained(Callback):
    """Adds to every checkpoint what a copy of it, alone, needs: which data it was trained on and its tokenizer."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        data = getattr(trainer, "datamodule", None)
        if data is not None:
            checkpoint["tokenizer"] = data.tokenizer
            checkpoint["data"] = {
                "class_path": f"{type(data).__module__}.{type(data).__qualname__}",
                "init_args": {k: v for k, v in data.hparams.items() if k not in pl_module.hparams},
            }


class BestCheckpoint(ModelCheckpoint):
    """`best.ckpt` by validation loss, and with each new best its bare weights as a plain dictionary.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        super().__init__(
            dirpath=run / "checkpoints",
            filename="best",
            monitor="val/loss",
            auto_insert_metric_name=False,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
        self.weights_path = run / WEIGHTS_NAME

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = self.best_model_score
        super().on_validation_end(trainer, pl_module)
        if self.best_model_score is not before and trainer.is_global_zero:
            _write_weights(trainer, pl_module, self.weights_path)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the best score when the run folder was moved, and forget it when only the checkpoint was."""
        here = Path(str(self.dirpath)) / "best.ckpt"
        if here.is_file():
            moved = {"dirpath": self.dirpath, "best_model_path": str(here), "kth_best_model_path": str(here)}
            scores = {str(here): score for score in state_dict["best_k_models"].values()}
            super().load_state_dict({**state_dict, **moved, "best_k_models": scores})


class LastCheckpoint(ModelCheckpoint):
    """`last.ckpt`, after every validation, at the end of every epoch (which Lightning does alone), and on an exception.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        super().__init__(
            dirpath=run / "checkpoints",
            filename="last",
            auto_insert_metric_name=False,
            enable_version_counter=False,
            save_on_train_epoch_end=True,
            save_on_exception=True,
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(Path(str(self.dirpath)) / "last.ckpt", weights_only=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore: the name is fixed."""


def _write_weights(trainer: Trainer, module: Any, path: Path) -> None:
    """Write `hyper_parameters`, the Transformer's `state_dict` and `tokenizer`, whole or not at all."""
    content = {
        "hyper_parameters": dict(module.hparams),
        "state_dict": {name: value.cpu() for name, value in module.transformer.state_dict().items()},
        "tokenizer": getattr(getattr(trainer, "datamodule", None), "tokenizer", None),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    replace_file(path, buffer.getvalue())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; raises InputError where it cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error

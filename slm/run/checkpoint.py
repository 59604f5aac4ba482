"""Checkpoints on disk: how they are found, read and written.

A run is one folder, `runs/version_N/`, with `checkpoints/best.ckpt`, `checkpoints/last.ckpt` and the best weights as a
plain dictionary in `simple_language_model.pt`.
"""

import contextlib
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from slm.errors import InputError, check
from slm.messages import say
from slm.model.transformer import Transformer
from slm.paths import expand_paths

RUNS = Path("runs")
WEIGHTS_NAME = "simple_language_model.pt"


def best_checkpoint(run: Path) -> Path:
    """Where a run keeps the checkpoint with its lowest validation loss."""
    return run / "checkpoints" / "best.ckpt"


def last_checkpoint(run: Path) -> Path:
    """Where a run keeps its newest checkpoint."""
    return run / "checkpoints" / "last.ckpt"


def run_folders(runs: Path = RUNS) -> list[Path]:
    """The run folders `version_N` under `runs`, the newest first."""
    return [runs / f"version_{number}" for number in sorted(run_numbers(runs), reverse=True)]


def newest_run(runs: Path = RUNS, *holding: str) -> Path:
    """The newest run folder that holds one of these files; a newer one that holds none is named on stderr.

    Raises:
        InputError: there is none.
    """
    found = run_folders(runs)
    check(bool(found), f"there is no run under {runs.absolute()}: start one with `python train.py`, or give a path")
    for run in found:
        if not holding or any((run / name).is_file() for name in holding):
            if run != found[0]:
                say(f"{found[0]} has no {holding[0]}: {run} is the newest run that has one; name the folder you mean")
            return run
    raise InputError(f"no run under {runs.absolute()} has {holding[0]}: train one longer, or give a path")


def run_numbers(runs: Path) -> list[int]:
    names = [path.name.removeprefix("version_") for path in runs.glob("version_*") if path.is_dir()]
    return [int(name) for name in names if name.isascii() and name.isdigit()]


def resolve_checkpoint(ckpt_path: str | Path, prefer: str = "last", runs: Path = RUNS) -> Path:
    """The file that `ckpt_path` means, whether or not it is there yet.

    Args:
        ckpt_path: `last` or `best`, of the newest run that has one; a run folder; or a `.ckpt` or `.pt` file. Where
            `prefer` is `last`, `last` is that of the newest run.
        prefer: which checkpoint of a run folder is meant, `last` or `best`; the other where that is not there.
        runs: where run folders are looked for.

    Raises:
        InputError: there is no such run, folder or file.
    """
    names = {"last": ("checkpoints/last.ckpt", "checkpoints/best.ckpt"), "best": ("checkpoints/best.ckpt",)}
    asked = str(ckpt_path)
    if asked == "last" and prefer == "last":  # a run that was killed before it saved anything goes on too
        path = newest_run(runs)
    elif asked in names:
        path = newest_run(runs, *names[asked])
    else:
        path = expand_paths(Path(ckpt_path), "ckpt_path")
    check(path.exists(), f"ckpt_path={ckpt_path}: there is no such file; give last, best, a run folder or a checkpoint")
    if not path.is_dir():
        return path
    kept = path / "checkpoints"
    preferred = kept / f"{asked if asked in names else prefer}.ckpt"
    return next((file for file in (preferred, kept / "last.ckpt", kept / "best.ckpt") if file.is_file()), preferred)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A `.ckpt` or `.pt` file as a dictionary with `hyper_parameters` and `state_dict`, on the CPU; runs no code in it.

    The file is a zip archive, which carries a CRC-32 of everything in it; what does not match its own is refused.

    Raises:
        InputError: the file is missing, damaged, or not a checkpoint of this project.
    """
    check(path.is_file(), f"{path}: there is no such checkpoint")
    try:
        file = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    damaged = f"{path} is damaged or not a checkpoint"
    try:
        bad_entry = zipfile.ZipFile(file).testzip()
        check(bad_entry is None, f"{damaged}: {bad_entry} does not have the CRC-32 that was written with it")
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except zipfile.BadZipFile as error:
        raise InputError(f"{damaged}: it is not a whole zip archive, which is what torch writes") from error
    except pickle.UnpicklingError as error:
        raise InputError(f"{damaged}: it holds more than tensors and plain values, which could run code") from error
    except Exception as error:  # damaged bytes can make the two readers raise anything
        raise InputError(f"{damaged}: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    known = isinstance(content, dict) and {"hyper_parameters", "state_dict"} <= content.keys()
    check(known, f"{path} is not a checkpoint of this project: it has no hyper_parameters and state_dict")
    hparams = content["hyper_parameters"]
    known = isinstance(hparams, dict) and isinstance(hparams.get("vocab_size"), int)
    check(known, f"{path} is not a checkpoint of this project: its hyper_parameters do not give a vocab_size")
    return content


def open_checkpoint(
    ckpt_path: str | Path, prefer: str = "last", runs: Path = RUNS, path: Path | None = None
) -> tuple[Path, dict[str, Any]]:
    """The file that `ckpt_path` means (see `resolve_checkpoint`) and its content (see `read_checkpoint`).

    Where the last one of a run is meant and damaged, that is said, and the furthest sound one beside it is taken.
    `path` is the file that is meant, where that is known already.

    Raises:
        InputError: there is no such file, or no sound one.
    """
    path = path or resolve_checkpoint(ckpt_path, prefer, runs)
    try:
        return path, read_checkpoint(path)
    except InputError as error:
        beside = sorted(file for file in path.parent.glob("*.ckpt") if file != path)
        others = []
        if str(ckpt_path) == "last" or (prefer == "last" and Path(ckpt_path).is_dir()):
            for file in beside:
                with contextlib.suppress(InputError):
                    others.append((file, read_checkpoint(file)))
        others = [(file, content) for file, content in others if "optimizer_states" in content]
        if not others:
            names = ", ".join(file.name for file in beside)
            raise InputError(f"{error}; beside it: {names}" if names else str(error)) from error
        other, content = max(others, key=lambda found: found[1]["global_step"])
        say(f"{error}; {other}, of step {content['global_step']}, is taken in its place")
        return other, content


def load_weights(transformer: Transformer, content: dict[str, Any], path: Path) -> None:
    """Load the weights in the content of a `.ckpt` or a `.pt`; raises InputError where they do not fit.

    A network on the meta device, which has no memory for them, gets them when it is sharded.
    """
    if any(parameter.is_meta for parameter in transformer.parameters()):
        return
    state = {name.removeprefix("transformer."): value for name, value in content["state_dict"].items()}
    try:
        transformer.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{path} does not fit this version of the model: {error}") from error

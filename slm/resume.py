"""What `--ckpt_path` means for a command: the checkpoint, the run's folder, and the settings they bring back."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.core.saving import load_hparams_from_yaml

from slm.checkpoint import read_checkpoint, resolve_checkpoint
from slm.errors import InputError, check


@dataclass
class Start:
    """How a command begins; the default is a new run with the command's own settings."""

    checkpoint: Path | None = None
    content: dict[str, Any] | None = None
    """What the checkpoint holds."""
    run: Path | None = None
    """The folder that the run goes on in; None for a new one, and for evaluation."""
    config: str | None = None
    """A value for `--config`, a file or JSON text, that brings back the settings of the checkpoint."""


def find_start(subcommand: str, ckpt_path: str | None) -> Start:
    """Find and read the checkpoint for `fit`, which goes on in its run's folder, or for an evaluation.

    An evaluation takes model, data and precision from the run, and none of its limits on batches. A checkpoint outside
    a run's folder has model and data settings in itself.

    Raises:
        InputError: there is no such checkpoint, it is damaged or foreign, or (`fit`) it holds weights alone.
    """
    fitting = subcommand == "fit"
    if ckpt_path is None:
        check(fitting, f"{subcommand} needs --ckpt_path: last, best, a run folder or a checkpoint file")
        return Start()
    path = resolve_checkpoint(ckpt_path, prefer="last" if fitting else "best")
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    config = run / "config.yaml"
    if fitting and ckpt_path == "last" and not path.is_file():
        return Start(run=run, config=str(config) if config.is_file() else None)
    content = read_checkpoint(path)
    if fitting and "optimizer_states" not in content:
        raise InputError(f"{path} holds weights alone, no run can go on from it: give the .ckpt of its run")
    if config.is_file() and fitting:
        return Start(path, content, run, str(config))
    if config.is_file():
        stored = _read_settings(config)
        settings = {key: stored[key] for key in ("model", "data")}
        settings["trainer"] = {"precision": stored["trainer"]["precision"]}
    else:
        settings = {"model": content["hyper_parameters"]}
        if "data" in content:
            settings["data"] = content["data"]
    return Start(path, content, None, json.dumps(settings))


def _read_settings(config: Path) -> dict[str, Any]:
    try:
        stored = load_hparams_from_yaml(str(config), use_omegaconf=False)
    except Exception as error:  # the YAML library has many, and is not ours to name
        raise InputError(
            f"{config} cannot be read: restore it, or copy the checkpoint elsewhere and use that"
        ) from error
    check(
        isinstance(stored, dict) and {"model", "data", "trainer"} <= stored.keys(),
        f"{config} does not hold the settings of a run: restore it, or copy the checkpoint elsewhere and use that",
    )
    return stored

"""A checkpoint -> the model that it holds."""

from pathlib import Path
from typing import Any

import torch

from slm.errors import InputError
from slm.run.checkpoint import load_weights, open_checkpoint
from slm.training.language_model import LanguageModel


def load(ckpt_path: str | Path) -> LanguageModel:
    """A trained model in eval mode, on the CPU.

    Args:
        ckpt_path: `last` or `best` (of the newest run under `runs/`), a run folder (its best), a `.ckpt` or a `.pt`.

    Raises:
        InputError: there is no such checkpoint, or it is damaged or foreign.
    """
    return restore(*open_checkpoint(ckpt_path, prefer="best"))


def restore(path: Path, content: dict[str, Any]) -> LanguageModel:
    """The model, in eval mode, of the content of a checkpoint; raises InputError where that does not fit."""
    try:
        with torch.random.fork_rng(devices=[]):  # a new model draws its weights from the caller's random numbers
            model = LanguageModel(**content["hyper_parameters"])
    except TypeError as error:
        raise InputError(f"{path} does not fit this version of the model: {error}") from error
    load_weights(model.transformer, content, path)
    return model.eval()

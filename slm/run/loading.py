"""A checkpoint -> the model that it holds, and the options that its weights depend on."""

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from slm.errors import InputError, check
from slm.model.transformer import Transformer
from slm.run.checkpoint import load_weights, open_checkpoint
from slm.training.hyperparameters import TRAINING_OPTIONS

if TYPE_CHECKING:
    from slm.training.language_model import LanguageModel

OURS = "slm.training.language_model.LanguageModel"
"""It is imported where it is needed, for it takes seconds: it is a LightningModule."""
_Made = TypeVar("_Made")


def load(ckpt_path: str | Path) -> "LanguageModel":
    """A trained model in eval mode, on the CPU.

    Args:
        ckpt_path: `last` or `best` (of the newest run under `runs/`), a run folder (its best), a `.ckpt` or a `.pt`.

    Raises:
        InputError: there is no such checkpoint, or it is damaged or foreign.
    """
    return restore(*open_checkpoint(ckpt_path, prefer="best"))


def restore(path: Path, content: dict[str, Any]) -> "LanguageModel":
    """The model, in eval mode, of the content of a checkpoint; raises InputError where that does not fit."""
    kind = import_model(model_named_in(content, path) or OURS)
    model = _made(kind, content["hyper_parameters"], path)
    load_weights(model.transformer, content, path)
    return model.eval()


def restore_network(path: Path, content: dict[str, Any]) -> Transformer:
    """Its network alone, for which nothing of Lightning is imported where the model is a plain LanguageModel."""
    network = _new_network(path, content)
    load_weights(network, content, path)
    return network.eval()


def first_network(path: Path, content: dict[str, Any], seed: int) -> Transformer:
    """The network of a checkpoint before any training, in eval mode: its weights are drawn anew.

    Args:
        seed: with that of the run, and the same version of torch, they are those that the run began with, unless it
            began with the weights of a file.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _new_network(path, content).eval()


def _new_network(path: Path, content: dict[str, Any]) -> Transformer:
    if (class_path := model_named_in(content, path)) is not None:
        return _made(import_model(class_path), content["hyper_parameters"], path).transformer
    options = {name: value for name, value in content["hyper_parameters"].items() if name not in TRAINING_OPTIONS}
    return _made(Transformer, options, path)


def _made(kind: type[_Made], options: Mapping[str, Any], path: Path) -> _Made:
    try:
        with torch.random.fork_rng(devices=[]):  # a new model draws its weights from the caller's random numbers
            return kind(**options)
    except TypeError as error:
        raise InputError(f"{path} does not fit this version of the model: {error}") from error


def class_path_of(kind: type[Any]) -> str:
    """How a class is named in settings: by the package that offers it, or else by its module."""
    package = kind.__module__.rpartition(".")[0]
    is_offered = getattr(sys.modules.get(package), kind.__qualname__, None) is kind
    return f"{package if is_offered else kind.__module__}.{kind.__qualname__}"


def is_ours(class_path: str) -> bool:
    """Whether a class belongs to this package, so that importing it runs no code of anyone else."""
    return class_path.startswith("slm.")


def import_model(class_path: str) -> "type[LanguageModel]":
    """The class of a model by its dotted name; raises InputError where there is none of that name."""
    from slm.training.language_model import LanguageModel

    kind = LanguageModel if class_path == "LanguageModel" else import_class(class_path, "model")
    is_model = isinstance(kind, type) and issubclass(kind, LanguageModel)
    check(is_model, f"model={class_path} is no LanguageModel: make it a subclass of slm.LanguageModel")
    return kind


def import_class(class_path: str, setting: str) -> Any:
    """A class by its dotted name; raises InputError, naming the setting that gives it, where there is none."""
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        message = f"{setting}={class_path}: there is no such class ({error}); give a name like package.module.Class"
        raise InputError(message) from error


def model_named_in(content: Mapping[str, Any], path: Path) -> str | None:
    """The class that a checkpoint names; None where it is LanguageModel.

    Raises:
        InputError: it is one of another package, which a file alone must not choose: importing it runs its code. The
            settings of the run that the file lies in may, or whoever has imported it already.
    """
    class_path = content.get("model_class")
    if class_path in (None, OURS):
        return None
    folders = [folder for folder in (path.parent, path.parent.parent) if (folder / "config.yaml").is_file()]
    is_named = any(f"class_path: {class_path}\n" in (f / "config.yaml").read_text(encoding="utf-8") for f in folders)
    is_imported = class_path.rpartition(".")[0] in sys.modules
    check(
        is_ours(class_path) or is_named or is_imported,
        f"{path} holds a {class_path}, which is not imported for a file alone: put the config.yaml of its run beside "
        "it, or name the class with --model",
    )
    return str(class_path)


def check_applicable(stored: Mapping[str, Any], asked: Mapping[str, Any], kind: "type[LanguageModel]") -> None:
    """Raise InputError where an option that the weights depend on is asked for with another value.

    An option that came after the checkpoint was made had its default there.
    """
    defaults = {name: parameter.default for name, parameter in kind.signature().parameters.items()}
    for name in (*sorted(kind.fixed_options()), "optimizer", "schedule"):
        has = stored.get(name, defaults[name])
        check(
            has == asked[name],
            f"{name}={asked[name]} cannot apply to a checkpoint trained with {name}={has}: leave it out, or start a "
            "new run without --ckpt_path",
        )

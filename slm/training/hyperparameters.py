"""What options a model has, and what values those of the training may have."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from slm.errors import check

OPTIMIZERS = ("adamw", "adam", "sgd", "muon")
TRAINING_OPTIONS = frozenset(
    {
        "learning_rate",
        "optimizer",
        "weight_decay",
        "schedule",
        "warmup_steps",
        "short_context_steps",
        "plateau_factor",
        "plateau_patience",
        "min_learning_rate",
        "compile",
        "activation_checkpointing",
    }
)
"""The options of LanguageModel that are not the network's, which can be known here without importing it."""
PARTS = 4
"""Of a window, in the steps of short context."""


def parameters_of(kind: type[Any]) -> dict[str, inspect.Parameter]:
    """The arguments of a class by name: its constructor's and, where that passes on `**options`, those of its bases."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        if "__init__" in vars(base):
            parameters = list(inspect.signature(vars(base)["__init__"], eval_str=True).parameters.values())[1:]
            named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            found = {p.name: p.replace(kind=p.KEYWORD_ONLY) for p in named} | found
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
    return found


def check_ranges(hparams: Mapping[str, Any]) -> None:
    """Raise InputError where a hyper-parameter of the training is out of its range; the network checks its own."""
    learning_rate, optimizer, schedule = (hparams[name] for name in ("learning_rate", "optimizer", "schedule"))
    weight_decay, warmup_steps, factor = (hparams[name] for name in ("weight_decay", "warmup_steps", "plateau_factor"))
    patience, minimum = hparams["plateau_patience"], hparams["min_learning_rate"]
    largest = torch.finfo(torch.float32).max
    check(0 < learning_rate < largest, f"learning_rate={learning_rate} must be above 0 and below {largest:.1e}")
    check(optimizer in OPTIMIZERS, f"optimizer={optimizer} must be one of {', '.join(OPTIMIZERS)}")
    check(0 <= weight_decay < largest, f"weight_decay={weight_decay} must be at least 0, and finite")
    check(schedule in ("plateau", "cosine"), f"schedule={schedule} must be plateau or cosine")
    check(warmup_steps >= 0, f"warmup_steps={warmup_steps} must be at least 0")
    is_used = schedule == "cosine" or warmup_steps == 0
    check(is_used, f"warmup_steps={warmup_steps} has no effect under schedule={schedule}: add --model.schedule cosine")
    check(0 < factor < 1, f"plateau_factor={factor} must be above 0 and below 1")
    check(patience >= 0, f"plateau_patience={patience} must be at least 0")
    check(minimum >= 0, f"min_learning_rate={minimum} must be at least 0")
    falls = schedule != "cosine" or minimum <= learning_rate
    check(falls, f"min_learning_rate={minimum} must be at most learning_rate={learning_rate} under schedule=cosine")
    short, seq_len = hparams["short_context_steps"], hparams["max_seq_len"]
    check(short >= 0, f"short_context_steps={short} must be at least 0")
    is_whole = short == 0 or seq_len % PARTS == 0
    check(is_whole, f"max_seq_len={seq_len} must be divisible by {PARTS} under short_context_steps={short}")

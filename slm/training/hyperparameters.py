"""What values hyper-parameters may have, which a checkpoint is tied to, and how the others replace the stored ones."""

from collections.abc import Mapping
from typing import Any

import torch

from slm.errors import check
from slm.training.optimizers import OPTIMIZERS

SHAPES = ("vocab_size", "embed_dim", "num_heads", "num_layers", "hidden_dim", "max_seq_len")
"""Those that the weights are tied to."""
FIXED = (*SHAPES, "optimizer", "schedule")
"""Those that the weights or the optimizer's state are tied to."""


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


def check_applicable(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise InputError where hyper-parameters that a checkpoint is tied to differ from those asked for."""
    for name in FIXED:
        check(
            stored.get(name) == asked[name],
            f"{name}={asked[name]} cannot apply to a checkpoint trained with {name}={stored.get(name)}: "
            "leave it out, or start a new run without --ckpt_path",
        )


def adapt_states(checkpoint: dict[str, Any], hparams: Mapping[str, Any], fused: bool) -> None:
    """Let `hparams` win over those that the optimizer and the schedule of a checkpoint were saved with."""
    stored = checkpoint["hyper_parameters"]
    changed = {name for name, value in hparams.items() if stored.get(name, value) != value}
    for state in checkpoint.get("optimizer_states", []):
        for group in state["param_groups"]:
            if "fused" in group:
                group["fused"] = fused
            if "weight_decay" in changed and group is not state["param_groups"][-1]:
                group["weight_decay"] = hparams["weight_decay"]
            if "learning_rate" in changed:
                group["lr"] = hparams["learning_rate"]
    for schedule in checkpoint.get("lr_schedulers", []):
        for name, entry in (("plateau_factor", "factor"), ("plateau_patience", "patience")):
            if name in changed:
                schedule[entry] = hparams[name]
        if "learning_rate" in changed:
            schedule["_last_lr"] = [hparams["learning_rate"]] * len(schedule["_last_lr"])
        if "min_learning_rate" in changed:
            schedule["min_lrs"] = [hparams["min_learning_rate"]] * len(schedule["min_lrs"])

"""The states of all random numbers of a process: taken, and put back."""

import random
from typing import Any

import numpy as np
import torch


def take_random_states(device: torch.device) -> dict[str, Any]:
    """Those of Python, NumPy, torch on the CPU, and torch on this device, as tensors and plain values."""
    state: Any = np.random.get_state()
    name, words, *rest = state
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    states["numpy"] = (name, words.tolist(), *rest)  # an array would not load with weights_only
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def put_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Put states back; those of another kind of device are left out."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])

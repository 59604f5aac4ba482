"""A small causal Transformer language model on PyTorch Lightning.

`slm.load(path)` gives a trained one back, `slm.write(prompt, path)` what it writes. The wings of the package:

    model/      tokens in, hidden states and logits out, the loss of them, the next token chosen
    training/   the LightningModule, optimizers and schedules
    data/       where tokens come from: dummy data and text, tokenizers, windows and their order
    formats/    networks and tokenizers as other programs keep them: transformers and llama.cpp
    run/        what makes a run whole: checkpoints, exact resume, signals, its folder and its processes
    watch/      what a run shows: bar, speed, TensorBoard, pictures, the closing report
    command/    from a command line to settings, and from an error to one line and an exit status
    page/       what one sees of a model in a browser
    research/   many runs: compared, swept, searched, and a law of them

The doors, one command each: cli.py (`train.py`), generate.py, look.py, runs.py, sweep.py, scaling.py, export.py,
benchmark.py, generate_benchmark.py.
A wing imports only from wings above it in this list (training and data never from each other), the doors from all; the
files beside the doors (errors.py, durable.py, hardware.py, messages.py, paths.py) serve all.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["InputError", "LanguageModel", "Settings", "Writer", "load", "write"]
_HOME = {
    "InputError": "errors",
    "LanguageModel": "training.language_model",
    "Settings": "generate",
    "Writer": "generate",
    "load": "run.loading",
    "write": "generate",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import slm` alone stays instant and changes nothing."""
    if name in _HOME:
        return getattr(import_module(f"slm.{_HOME[name]}"), name)
    raise AttributeError(f"module 'slm' has no attribute {name!r}")

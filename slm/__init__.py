"""A small causal Transformer language model on PyTorch Lightning; `slm.load(path)` gives a trained one
back, `slm.write(prompt, path)` what it writes."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["InputError", "LanguageModel", "Settings", "Writer", "load", "write"]
_HOME = {
    "InputError": "errors",
    "LanguageModel": "module",
    "Settings": "generate",
    "Writer": "generate",
    "load": "trained",
    "write": "generate",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import slm` alone stays instant and changes nothing."""
    if name in _HOME:
        return getattr(import_module(f"slm.{_HOME[name]}"), name)
    raise AttributeError(f"module 'slm' has no attribute {name!r}")

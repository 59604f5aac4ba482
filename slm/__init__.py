"""A small causal Transformer language model on PyTorch Lightning; `slm.load(path)` gives a trained one back."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["InputError", "LanguageModel", "load"]


def __getattr__(name: str) -> Any:
    """Import on first use: `import slm` alone stays instant and changes nothing."""
    if name in ("LanguageModel", "load"):
        from slm import module

        return getattr(module, name)
    if name == "InputError":
        from slm.errors import InputError

        return InputError
    raise AttributeError(f"module 'slm' has no attribute {name!r}")

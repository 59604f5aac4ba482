"""Where tokens come from: dummy data and text, cut into windows, in an order that can be resumed."""

from importlib import import_module
from typing import Any

__all__ = ["DummyData", "TextData", "TokenData"]
_HOME = {"DummyData": "dummy", "TextData": "text_data", "TokenData": "token_data"}


def __getattr__(name: str) -> Any:
    """Import on first use: to write text needs no Lightning, which takes seconds to import."""
    if name in _HOME:
        return getattr(import_module(f"slm.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'slm.data' has no attribute {name!r}")

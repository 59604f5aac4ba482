"""Settings that are paths: `~` in them is the home folder, whatever file or flag they come from."""

import os
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from slm.errors import check

PATHS = (
    *("ckpt_path", "config", "data", "default_root_dir", "dirpath", "figure", "from_hf", "init_from", "output"),
    *("path", "prompt_file", "runs", "save_dir", "tokenizer", "val_path"),
)
"""Names of settings that are paths, in every command; `data` may name a file of settings."""


def expand_paths(settings: Any, name: str = "") -> Any:
    """Settings with the home folder in the place of `~` at the beginning of every path among them.

    Args:
        settings: a namespace, which is changed, a dictionary, a list, or the value of one setting.
        name: of the setting, where it is one.

    Raises:
        InputError: a path begins with `~` and there is no home folder.
    """
    if isinstance(settings, Namespace | dict):
        for key, value in list(vars(settings).items() if isinstance(settings, Namespace) else settings.items()):
            settings[key] = expand_paths(value, key)
    elif isinstance(settings, list | tuple):
        return [expand_paths(value, name) for value in settings]
    elif name in PATHS and isinstance(settings, str | Path):
        return type(settings)(_expanded(str(settings), name))
    return settings


def _expanded(path: str, name: str) -> str:
    expanded = os.path.expanduser(path)
    is_home = path == "~" or path.startswith("~/")
    check(
        not is_home or os.path.isabs(expanded),
        f"{name}={path}: there is no home folder that ~ stands for: set HOME, or give the whole path",
    )
    return expanded

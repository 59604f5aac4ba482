"""Flags and files of settings, and what is wrong with them in one line."""

import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace, get_loader

from slm.errors import InputError, check
from slm.paths import expand_paths

LINKED = ("vocab_size", "max_seq_len")
"""What the data takes from the model."""


def new_parser(module: str) -> ArgumentParser:
    """The parser of the command `python -m slm.MODULE`."""
    return ArgumentParser(prog=f"python -m slm.{module}", exit_on_error=False, allow_abbrev=False)


def parse_flags(parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
    """The settings that a command line gives, by default this process's; raises InputError for what is wrong in it."""
    flags = list(sys.argv[1:] if argv is None else argv)
    try:
        settings: Namespace = expand_paths(parser.parse_args(flags))
    except ArgumentError as error:
        known = dict.fromkeys(parser.get_defaults().keys(), "")
        raise InputError(explain_parser_error(str(error), known, flags)) from error
    return settings


def explain_parser_error(message: str, known: Mapping[str, str], argv: Sequence[str]) -> str:
    """A parser's message of many lines as one line: the setting, its value and what was expected.

    Args:
        message: what jsonargparse says.
        known: names of all settings, to find the nearest to an unknown one, each with the class that alone has it.
        argv: the command line.
    """
    if without_value := re.search(r"argument (?:-\w/)?--([\w.]+)(?:/--\S+)*: expected one argument", message):
        return _explain_missing_value(without_value[1], argv)
    keys = re.findall(r'Parser key "([^"]+)"', message)
    unknown = re.search(r"[Oo]ption '([^']+)'|[Uu]nrecognized arguments: (?:--)?([^\s=]+)", message)
    if unknown:
        name = ".".join([*keys, *re.findall(r"Group '([^']+)'", message), unknown[1] or unknown[2]])
        if name.removeprefix("data.").removeprefix("init_args.") in LINKED:
            return f"{name} is taken from the model: set model.{name.rpartition('.')[2]} instead"
        if known.get(name):
            remedy = f"choose it with --data {known[name]} or --config"
            return f"{name} is a setting of {known[name]}, which is not the data chosen: {remedy}"
        near = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(name, known, n=1, cutoff=0)
        return f"unknown setting {name}; the nearest known one is {near[0]}"
    detail = message[message.rindex("Parser key") :] if keys else message
    value = re.search(r"(?:Got|Given) value: ?(.*)", detail)
    if not (keys and value):
        return " ".join(re.sub('Parser key "(.+?)"', r"\1", message).split())
    if "dot import path" in detail:
        classes = "DummyData or TextData" if keys == ["data"] else "a name like package.module.Class"
        return f"{'.'.join(keys)}={value[1]}: there is no such class; give {classes}"
    kinds = re.findall(r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.+?)\])", detail[: value.start()])
    names = {"NoneType": "null", "Sequence": "a list like [1,2]"}
    expected = " or ".join(names.get(kind, kind) or f"one of {choices}" for kind, choices in kinds)
    return f"{'.'.join(keys)}={value[1]}: expected {expected}"


def _explain_missing_value(name: str, argv: Sequence[str]) -> str:
    """For a flag whose value is missing, or looks like a flag; `name` is the flag or the group that it belongs to."""
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        if (flag == f"--{name}" or flag.startswith(f"--{name}.")) and (value.startswith("-") or not value):
            hint = f": one that begins with a dash is given as {flag}={value}" if value else ""
            return f"{flag.removeprefix('--')} needs a value{hint}"
    return f"{name} needs a value"


def read_settings(config: str) -> dict[str, Any]:
    """The content of a YAML file of settings, or of YAML text given in its place.

    Raises:
        InputError: the file is missing or unreadable, or it is not YAML, or not a mapping.
    """
    is_text = "{" in config or "\n" in config
    try:
        settings = get_loader("yaml")(config if is_text else Path(config).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{config} cannot be read: {error.strerror}; give a YAML file of settings") from error
    except Exception as error:  # the YAML library's own, which are not ours to name
        raise InputError(f"{config} is not valid YAML: {error}") from error
    check(isinstance(settings, dict), f"{config} holds no settings: it must be YAML like `trainer: {{max_epochs: 5}}`")
    return settings

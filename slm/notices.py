"""What is said: the project's own lines; the libraries' notices, silenced by name; the parser's errors in one line."""

import difflib
import logging
import re
import sys
import warnings
from collections.abc import Mapping, Sequence

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.fabric.utilities.rank_zero import rank_zero_only

from slm.errors import InputError
from slm.paths import expand_paths

LOG_LINES = {
    "tensorboard": ["Detected out of order event.step"],  # a killed run's points, which were drawn again
    "lightning.fabric.utilities.seed": [r"(\[rank: \d+\] )?Seed set to "],
    "lightning.fabric.utilities.distributed": ["Initializing distributed: "],
    "lightning.pytorch.utilities.rank_zero": [
        "GPU available: ",
        "TPU available: ",
        "HPU available: ",
        "LOCAL_RANK: ",
        "-{20,}",  # "distributed_backend=gloo", in a box
        "Using (bfloat16|16bit) Automatic Mixed Precision",
        ".*Tip: ",  # an advertisement
        r"`Trainer\(.*\)` was configured so",  # says again what was asked
        "Running in `fast_dev_run` mode",  # the closing report says what it lacks
        "`Trainer.fit` stopped: ",
        "Restoring states from the checkpoint",
        "Restored all states from the checkpoint",
        "Loaded model weights from the checkpoint",
        "An .* was raised with message",  # the exception itself is shown
    ],
}
"""Log lines, by logger, that tell nothing a user can act on: regular expressions for their beginning."""

WARNINGS = {
    "lightning.pytorch.utilities._pytree": ["`isinstance\\(treespec, LeafSpec\\)` is deprecated"],
    "lightning.pytorch.trainer.connectors.data_connector": [
        "You have overridden `on_before_batch_transfer` in `LightningModule`",  # which is where it belongs
        "The '.*_dataloader' does not have many workers",  # the windows come from memory
    ],
    "lightning.pytorch.trainer.call": [
        "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",  # an evaluation needs none
    ],
    "lightning.pytorch.loops.fit_loop": [
        "The number of training batches .* is smaller than the logging interval",  # it counts on over epochs
    ],
    "lightning.pytorch.loops.training_epoch_loop": [
        "You're resuming from a checkpoint that ended before the epoch ended",  # the data goes on where it was
    ],
    "lightning.pytorch.callbacks.model_checkpoint": [
        "Checkpoint directory .* exists and is not empty",  # a resumed run's own
    ],
}
"""Warnings, by the module that gives them, likewise."""


def silence_notices() -> None:
    """Silence the notices listed above, one by one; any other warning or log line still appears."""
    for module, messages in WARNINGS.items():
        for message in messages:
            warnings.filterwarnings("ignore", message=message, module=re.escape(module))
    for name, lines in LOG_LINES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(present, _Silence) for present in logger.filters):
            logger.addFilter(_Silence(lines))


class _Silence(logging.Filter):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.pattern = re.compile("|".join(lines))

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.pattern.match(record.getMessage())


@rank_zero_only
def say(message: str) -> None:
    """Print a line on stderr, once, however many processes there are."""
    print(message, file=sys.stderr, flush=True)


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
        if known.get(name):
            remedy = f"choose it with --data {known[name]} or --config"
            return f"{name} is a setting of {known[name]}, which is not the data chosen: {remedy}"
        near = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(name, known, n=1, cutoff=0)
        return f"unknown setting {name}; the nearest known one is {near[0]}"
    detail = message[message.rindex("Parser key") :] if keys else message
    value = re.search(r"(?:Got|Given) value: (.+)", detail)
    if not (keys and value):
        return " ".join(re.sub('Parser key "(.+?)"', r"\1", message).split())
    if "dot import path" in detail:
        classes = "DummyData or TextData" if keys == ["data"] else "a name like package.module.Class"
        return f"{'.'.join(keys)}={value[1]}: there is no such class; give {classes}"
    kinds = re.findall(r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.+?)\])", detail[: value.start()])
    expected = " or ".join("null" if kind == "NoneType" else kind or f"one of {choices}" for kind, choices in kinds)
    return f"{'.'.join(keys)}={value[1]}: expected {expected}"


def _explain_missing_value(name: str, argv: Sequence[str]) -> str:
    """For a flag whose value is missing, or looks like a flag; `name` may be but the group that it belongs to."""
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        if (flag == f"--{name}" or flag.startswith(f"--{name}.")) and (value.startswith("-") or not value):
            hint = f": one that begins with a dash is given as {flag}={value}" if value else ""
            return f"{flag.removeprefix('--')} needs a value{hint}"
    return f"{name} needs a value"

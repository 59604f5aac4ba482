"""What a command line asks for: a subcommand, its flags, and the checkpoint whose settings come before them."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from jsonargparse import get_loader
from lightning.pytorch import Trainer

from slm.errors import InputError, check
from slm.messages import say
from slm.paths import expand_paths
from slm.run.checkpoint import RUNS, WEIGHTS_NAME, newest_run, open_checkpoint, resolve_checkpoint
from slm.run.slurm import requeued_run
from slm.training.hyperparameters import SHAPES

SUBCOMMANDS = ("fit", "validate", "test", "predict")
LINKED = ("vocab_size", "max_seq_len")
"""What the data takes from the model."""


class CommandLineTrainer(Trainer):
    """Lightning's Trainer.

    A parser is to read a whole number of batches as that many. Lightning declares these arguments as
    `Optional[Union[int, float]]`, which Python's cache of types turns into float before int where another package was
    first: `--trainer.limit_val_batches 1` then quietly means 1.0, all of them.
    """

    def __init__(
        self,
        *args: Any,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: int | float | str | timedelta | dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args,
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            overfit_batches=overfit_batches,
            val_check_interval=val_check_interval,
            **kwargs,
        )


@dataclass
class Request:
    """A command line, taken apart."""

    subcommand: str
    flags: list[str]
    """What was given, without subcommand and `--ckpt_path`."""
    stored: list[str] = field(default_factory=list)
    """Flags that bring back the settings of the checkpoint; `flags` come after them and win."""
    checkpoint: Path | None = None
    content: dict[str, Any] | None = None
    """What the checkpoint holds."""
    run: Path | None = None
    """The folder of the run that goes on; None for a new one, and for an evaluation."""
    initial: tuple[Path, dict[str, Any]] | None = None
    """A file whose weights a new run begins with, and its content."""


def read_request(argv: Sequence[str]) -> Request:
    """Take a command line apart; `fit` is the subcommand where none is given.

    With `--ckpt_path`, `fit` goes on in the folder of the checkpoint's run, with its settings. An evaluation takes
    model, data and precision from there, and none of the limits on batches. A checkpoint outside a run's folder has
    model and data settings in itself.

    Raises:
        InputError: a setting that cannot be given, an unreadable file of settings, an evaluation without checkpoint, a
            checkpoint that is missing, damaged or foreign, or (`fit`) holds weights alone.
    """
    for flag in argv:
        check(_is_utf8(flag), f"{os.fsencode(flag)!r} is not UTF-8: rename the file, or type it anew")
    subcommand, given = (argv[0], argv[1:]) if argv and argv[0] in SUBCOMMANDS else ("fit", argv)
    flags, ckpt_paths = _take_option(given, "--ckpt_path")
    _refuse_ignored(flags)
    request = Request(subcommand, flags)
    left, initial = _take_option(flags, "--init_from")
    if subcommand == "fit" and (requeued := requeued_run(_runs(flags), argv)) is not None:
        say(f"the job was requeued: it goes on in {requeued}")
        request.flags, ckpt_paths, initial = left, [str(requeued / "checkpoints" / "last.ckpt")], []
    others = "--ckpt_path" if ckpt_paths else subcommand if subcommand != "fit" else ""
    if initial:
        remedy = f"leave it out, {others} " + ("goes on with one" if ckpt_paths else "needs --ckpt_path")
        check(not others, f"--init_from={initial[-1]} begins a new run: {remedy}")
    elif not others:
        configs = map(read_settings, _take_option(flags, "-c", "--config")[1])
        initial = [config["init_from"] for config in configs if config.get("init_from") is not None]
    if initial:
        _begin_with(request, initial[-1])
    elif ckpt_paths:
        _find_checkpoint(request, ckpt_paths[-1])
    elif subcommand != "fit" and not {"-h", "--help", "--print_config"} & set(flags):
        raise InputError(f"{subcommand} needs --ckpt_path: last, best, a run folder or a checkpoint file")
    return request


def _is_utf8(text: str) -> bool:
    return text == text.encode(errors="ignore").decode()


def read_settings(config: str) -> dict[str, Any]:
    """The content of a YAML file of settings, or of YAML text given in its place.

    Raises:
        InputError: the file is missing or unreadable, or it is not YAML, or not a mapping.
    """
    is_text = "{" in config or "\n" in config
    try:
        settings = get_loader("yaml")(config if is_text else Path(config).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{config} cannot be read: {error.strerror}") from error
    except Exception as error:  # the YAML library's own, which are not ours to name
        raise InputError(f"{config} is not valid YAML: {error}") from error
    check(isinstance(settings, dict), f"{config} holds no settings: it must be YAML like `trainer: {{max_epochs: 5}}`")
    return settings


def _find_checkpoint(request: Request, ckpt_path: str) -> None:
    fitting = request.subcommand == "fit"
    runs = _runs(request.flags)
    prefer = "last" if fitting else "best"
    path = resolve_checkpoint(ckpt_path, prefer, runs)
    if path.parent.parent == Path() or path.parent == Path():  # given from inside the run's folder
        path = path.absolute()
    in_checkpoints = path.parent.name == "checkpoints"
    run = path.parent.parent if in_checkpoints else path.parent
    has_config = (in_checkpoints or path.name == WEIGHTS_NAME) and (run / "config.yaml").is_file()
    config = run / "config.yaml" if has_config else None
    if fitting and ckpt_path == "last" and not path.is_file():
        request.run = run
        request.stored = [] if config is None else [f"--config={config}"]
        return
    path, content = open_checkpoint(ckpt_path, prefer, runs, path)
    request.checkpoint, request.content = path, content
    if fitting and "optimizer_states" not in content:
        raise InputError(f"{path} holds weights alone, no run can go on from it: give the .ckpt of its run")
    if fitting and config is not None:
        request.run = run
        request.stored = [f"--config={config}"]
        return
    settings: dict[str, Any] = {"model": content["hyper_parameters"]}
    if config is not None:
        stored = read_settings(str(config))
        missing = {"model", "data", "trainer"} - stored.keys()
        check(
            not missing, f"{config} has no settings of {sorted(missing)}: restore it, or copy the checkpoint elsewhere"
        )
        settings = {"model": stored["model"], "data": stored["data"], "trainer": {}}
        if "precision" in stored["trainer"]:
            settings["trainer"]["precision"] = stored["trainer"]["precision"]
    elif content.get("data", {}).get("class_path", "").startswith("slm.data."):  # another may run code when imported
        settings["data"] = content["data"]
    else:
        named = _take_option(request.flags, "-c", "--config", "--data")[1]
        check(bool(named), f"{path} does not say what data of ours it was trained on: name it with --data or --config")
    request.stored = [f"--config={json.dumps(settings)}"]


def _begin_with(request: Request, init_from: str) -> None:
    """Let a new run have the shapes and, unless other data is chosen, the kind of text of the file it begins with."""
    if init_from in ("last", "best"):  # a process beside this one may have begun the newest already
        kept = f"checkpoints/{init_from}.ckpt"
        init_from = str(newest_run(_runs(request.flags), kept) / kept)
    init_from = expand_paths(init_from, "init_from")
    check(Path(init_from).exists(), f"init_from={init_from}: there is no such file; give a run, a .ckpt or a .pt")
    path, content = request.initial = open_checkpoint(init_from, prefer="best")
    shapes = {name: content["hyper_parameters"][name] for name in SHAPES}
    for name, size in shapes.items():
        for asked in _take_option(request.flags, f"--model.{name}")[1]:
            has = f"cannot apply to the weights in {path}, which have {name}={size}: leave it out"
            check(asked == str(size), f"{name}={asked} {has}")
    if (tokenizer := content.get("tokenizer")) is not None:
        text = {"class_path": "TextData", "init_args": {"tokenizer": "bytes" if tokenizer == "bytes" else "bpe"}}
        request.stored = [f"--config={json.dumps({'data': text})}"]
    for given in _settings_given(request.flags, "model"):
        for name in given.keys() & shapes.keys():
            if given[name] != shapes[name]:
                say(f"model.{name} is {shapes[name]}, which the weights in {path} have, and not {given[name]}")
    request.flags = [*request.flags, f"--config={json.dumps({'model': shapes})}"]


def _runs(flags: Sequence[str]) -> Path:
    """Where run folders are looked for."""
    roots = _take_option(flags, "--trainer.default_root_dir")[1]
    return Path(roots[-1]) / RUNS if roots else RUNS


def _take_option(flags: Sequence[str], *names: str) -> tuple[list[str], list[str]]:
    """The flags without the options of these names, and the values that those had."""
    left, values, rest = [], [], iter(flags)
    for flag in rest:
        name, equals, value = flag.partition("=")
        if name not in names:
            left.append(flag)
        else:
            values.append(value if equals else next(rest, ""))
            check(values[-1] != "", f"{name} needs a value")
    setting = "config" if names[0] == "-c" else names[0].rpartition(".")[2].removeprefix("--")
    return left, expand_paths(values, setting)


def _refuse_ignored(flags: list[str]) -> None:
    """Refuse what the parser would silently ignore: settings of the data that are taken from the model.

    They can be given as flags, or in a file or text for `--config`, `--data` or `--data.init_args`.
    """
    given = {flag.partition("=")[0].removeprefix("--").replace(".init_args", "") for flag in flags}
    for config in map(read_settings, _take_option(flags, "-c", "--config")[1]):
        check(config.get("ckpt_path") is None, "ckpt_path stands in a file of settings: give it as --ckpt_path instead")
    for data in _settings_given(flags, "data"):
        given |= {f"data.{name}" for name in {**data, **(data.get("init_args") or {})}}
    for name in LINKED:
        check(f"data.{name}" not in given, f"data.{name} is taken from the model: set model.{name} instead")


def _settings_given(flags: Sequence[str], group: str) -> list[dict[str, Any]]:
    """The settings of a group that stand in files or text given for it or for `--config`."""
    found = [config.get(group) for config in map(read_settings, _take_option(flags, "-c", "--config")[1])]
    for value in _take_option(flags, f"--{group}", f"--{group}.init_args")[1]:
        if "{" in value or Path(value).is_file():
            found.append(read_settings(value))
    return [settings for settings in found if isinstance(settings, dict)]

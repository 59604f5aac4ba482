"""A command line of `train.py` -> the settings of a run, and the checkpoint that it starts from."""

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from slm.command.flags import LINKED, read_settings
from slm.command.parser import TrainingParser
from slm.data import TokenData
from slm.data.text_data import NAMED_TOKENIZERS
from slm.errors import InputError, check
from slm.messages import say
from slm.paths import PATHS, expand_paths
from slm.run.checkpoint import RUNS, WEIGHTS_NAME, last_checkpoint, newest_run, open_checkpoint, resolve_checkpoint
from slm.run.job import JOB_FILE, run_of_job
from slm.run.loading import check_applicable, class_path_of, import_class, import_model, is_ours, model_named_in
from slm.run.processes import Processes
from slm.training.hyperparameters import parameters_of
from slm.training.language_model import LanguageModel

SUBCOMMANDS = ("fit", "validate", "test", "predict")
HELP = ("-h", "--help", "--print_config")


@dataclass
class Start:
    """Where a command starts: nowhere, in a run that goes on, or with the weights of a file.

    Attributes:
        path: the checkpoint, or the file with weights.
        content: what that holds, as large as model and optimizer.
        run: the folder of the run that goes on; None for a new one and for an evaluation.
        settings: what belongs to the checkpoint, as files of settings hold it; the command line's own come on top.
        config: the file that they are from, where there is one.
        is_new_run: whether only weights and tokenizer are taken over.
        steps: how many the checkpoint has done.
    """

    path: Path | None = None
    content: dict[str, Any] = field(default_factory=dict)
    run: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    config: Path | None = None
    is_new_run: bool = False

    def __post_init__(self) -> None:
        self.steps: int | None = self.training_state.get("global_step")

    @property
    def training_state(self) -> dict[str, Any]:
        """The content of a checkpoint whose training goes on; nothing for a new one."""
        return {} if self.is_new_run else self.content

    @property
    def goes_on(self) -> bool:
        """Whether a run goes on in its own folder, from a checkpoint."""
        return self.run is not None and self.path is not None

    def release_content(self) -> dict[str, Any]:
        """The content, which from here on is held by the caller alone."""
        content, self.content = self.content, {}
        return content

    def flags(self) -> list[str]:
        """Its settings, for a parser."""
        given = self.config or (json.dumps(self.settings) if self.settings else None)
        return [] if given is None else [f"--config={given}"]

    def check_same_data(self, fingerprint: str | None) -> None:
        """Raise InputError where a run would go on with data that has changed."""
        stored = self.training_state.get("fingerprint")
        check(
            stored in (None, fingerprint),
            f"the data is not what {self.path} was trained on: its fingerprint is {fingerprint}, the run had {stored}; "
            "restore it, or say --allow_changed_data true",
        )


@dataclass
class Command:
    """A command line that was read.

    Attributes:
        subcommand: `fit`, `validate`, `test` or `predict`.
        settings: all settings in force.
        start: where it starts.
        model_class: of the model.
        is_other_data_meant: whether a run is to go on with other data than it was trained on.
    """

    subcommand: str
    settings: Namespace
    start: Start
    model_class: type[LanguageModel]
    is_other_data_meant: bool
    parser: TrainingParser

    @property
    def ckpt_path(self) -> str | None:
        """What the Trainer loads itself; None for bare weights, and where nothing is loaded."""
        has_optimizer = self.start.steps is not None
        return str(self.start.path) if has_optimizer and self.start.path else None

    def new_model(self, on_meta: bool = False) -> LanguageModel:
        """The model; on the meta device, where weights have no values, if another process shares its own out."""
        options = {name: value for name, value in vars(self.settings.model).items() if name != "class_path"}
        with torch.device("meta") if on_meta else nullcontext():
            return _made(self.model_class, options)

    def new_data(self, model: LanguageModel) -> TokenData:
        """The data, which takes the size of the vocabulary and of a window from the model."""
        taken = {name: model.hparams[name] for name in LINKED}
        data: TokenData = _made(self.parser.data_class(self.settings), {**vars(self.settings.data.init_args), **taken})
        return data

    def instantiate(self) -> Namespace:
        """The settings with the Trainer's callbacks, loggers and plugins made."""
        try:
            return self.parser.instantiate(self.settings)
        except (ValueError, TypeError) as error:
            raise _not_made(error) from error

    def fingerprint(self) -> str:
        """Of the settings in force, paths apart."""
        content = json.dumps(_without_paths(self.settings.as_dict()), sort_keys=True, default=str)
        return blake2b(content.encode(), digest_size=8).hexdigest()

    def text(self) -> str:
        """The settings in force, as they were asked for, in YAML."""
        settings = self.settings.clone()
        for name in ("config", "ckpt_path", "allow_changed_data"):
            settings.pop(name, None)
        return self.parser.dump(settings)


def _without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """What must be the same on every node, where files may lie elsewhere."""
    kept = {name: value for name, value in flat(settings) if name.rpartition(".")[2] not in PATHS}
    return {name: value for name, value in kept.items() if not name.startswith("trainer.logger")}


def read_command(argv: Sequence[str], processes: Processes | None = None) -> Command:
    """Read a command line; `fit` is the subcommand where none is given.

    With `--ckpt_path`, `fit` goes on in the folder of the checkpoint's run, with its settings. An evaluation takes
    model, data and precision from there, and none of the limits on batches. A checkpoint outside a run's folder has
    model and data settings in itself. Of several processes, rank 0 says which run is meant.

    Raises:
        InputError: a setting that is unknown or out of its range, an unreadable file of settings, an evaluation
            without checkpoint, a checkpoint that is missing, damaged or foreign or (`fit`) holds weights alone, other
            data than the run was trained on.
    """
    asked = _asked(argv, processes or Processes())
    start = _start(asked)
    model_class = _model_class(asked.model, start)
    parser = TrainingParser(model_class, asked.subcommand)
    settings = expand_paths(parser.parse([*start.flags(), *asked.flags], argv))
    settings.model.class_path = class_path_of(model_class)
    for name in ("path", "val_path", "tokenizer"):  # absolute, since the run may go on from another folder
        value = settings.data.init_args.get(name)
        if value and (name != "tokenizer" or value not in NAMED_TOKENIZERS):
            settings.data.init_args[name] = str(Path(value).absolute())
    seed = settings.seed_everything
    check(0 <= seed < 2**32, f"seed_everything={seed} must be at least 0 and below 2**32")

    is_other_data_meant = bool(settings.allow_changed_data)
    if start.is_new_run:
        _keep_shapes(settings, start, model_class, asked)
    elif start.settings:
        if start.content:
            check_applicable(start.content["hyper_parameters"], dict(settings.model), model_class)
        is_other_data_meant = _say_what_changed(start, settings, model_class, asked.subcommand == "fit")
    return Command(asked.subcommand, settings, start, model_class, is_other_data_meant, parser)


@dataclass
class _Asked:
    """What a command line asks for that must be known before the parser: where to start, and the class of the model.

    Attributes:
        flags: the rest of it.
        files: the files of settings that it names, read.
        runs: where run folders are looked for.
    """

    subcommand: str
    flags: list[str]
    files: list[dict[str, Any]]
    ckpt_path: str | None
    init_from: str | None
    model: str | None
    runs: Path


def _asked(argv: Sequence[str], processes: Processes) -> _Asked:
    for flag in argv:
        is_utf8 = flag == flag.encode(errors="ignore").decode()
        check(is_utf8, f"{os.fsencode(flag)!r} is not UTF-8: rename the file, or type it anew")
    subcommand, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("fit", argv)
    check(subcommand in SUBCOMMANDS, f"{subcommand} is not what train.py does: give {', '.join(SUBCOMMANDS)} or a flag")
    given, left = _look_for(["--ckpt_path", "--init_from", "--model"], flags)
    seen, _ = _look_for(["--config", "--model.class_path", "--trainer.default_root_dir"], left)
    files = [read_settings(config) for config in expand_paths(seen["config"], "config")]
    in_files = [content for content in files if content.get("ckpt_path") is not None]
    check(not in_files, "ckpt_path stands in a file of settings: give it as --ckpt_path instead")
    roots = seen["trainer.default_root_dir"] or _found(files, "trainer", "default_root_dir")
    runs = Path(expand_paths(roots[-1], "default_root_dir")) / RUNS if roots else RUNS
    models = [name for name in given["model"] if _is_class(name)] + seen["model.class_path"]
    models = models or _found(files, "model", "class_path")
    left = [*(f"--model={value}" for value in given["model"] if not _is_class(value)), *left]
    ckpt_paths, init_from = given["ckpt_path"], given["init_from"]
    if subcommand == "fit" and not ckpt_paths:
        init_from = init_from or [content["init_from"] for content in files if content.get("init_from") is not None]
    run = run_of_job(runs, argv) if subcommand == "fit" and processes.rank == 0 else None
    if run is not None and not last_checkpoint(run).is_file() and (ckpt_paths or init_from):
        run = None  # it kept nothing of what it began with
    if (begun := processes.from_rank_zero(run and str(run))) is not None:
        say(f"the job was started again: it goes on in {begun}")
        ckpt_paths, init_from = [begun], []
    return _Asked(subcommand, left, files, _last(ckpt_paths), _last(init_from), _last(models), runs)


def _last(values: Sequence[str]) -> str | None:
    return values[-1] if values else None


def _start(asked: _Asked) -> Start:
    """Where the command starts; raises InputError as `read_command` does."""
    if asked.model is not None:
        import_model(asked.model)  # which lets a checkpoint be of that class
    is_fitting = asked.subcommand == "fit"
    if asked.init_from is not None:
        others = "--ckpt_path goes on with one" if asked.ckpt_path else f"{asked.subcommand} needs --ckpt_path"
        is_alone = is_fitting and asked.ckpt_path is None
        check(is_alone, f"--init_from={asked.init_from} begins a new run: leave it out, {others}")
        return _begin_with(asked.init_from, asked.runs)
    if asked.ckpt_path is None:
        is_fine = is_fitting or bool(set(HELP) & set(asked.flags))
        check(is_fine, f"{asked.subcommand} needs --ckpt_path: last, best, a run folder or a checkpoint file")
        return Start()
    start = _go_on(asked.ckpt_path, is_fitting, asked.runs)
    is_known = start.path is None or "data" in start.settings
    is_named = any(_look_for(["--data", "--config"], asked.flags)[0].values())
    remedy = "name it with --data or --config"
    check(is_known or is_named, f"{start.path} does not say what data of ours it was trained on: {remedy}")
    return start


def flat(settings: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by their dotted names, as flags have them."""
    if isinstance(settings, dict) and settings:
        for key, value in settings.items():
            yield from flat(value, f"{name}.{key}".removeprefix(".").replace(".init_args", ""))
    else:
        yield name, settings


def _look_for(names: Sequence[str], flags: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The values of some options, of which each may come several times, and the flags without these."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in names:
        short = ["-c"] if name == "--config" else []
        parser.add_argument(*short, name, action="append", default=[], dest=name.removeprefix("--"))
    try:
        found, left = parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise InputError(f"{str(error.argument_name).rpartition('/')[2]} needs a value") from error
    for name, values in vars(found).items():
        check("" not in values, f"--{name} needs a value")
    return vars(found), left


def _found(files: Sequence[Mapping[str, Any]], group: str, name: str) -> list[Any]:
    """The values that a setting has in files of settings."""
    groups = [content.get(group) for content in files]
    return [group[name] for group in groups if isinstance(group, dict) and group.get(name) is not None]


def _is_class(value: str) -> bool:
    """Whether a value of `--model` names a class, and not settings or a file of them."""
    return all(part.isidentifier() for part in value.split(".")) and not Path(value).is_file()


def _model_class(asked: str | None, start: Start) -> type[LanguageModel]:
    """The class asked for, or that of the checkpoint; raises InputError where these are two."""
    stored = import_model((start.settings.get("model") or {}).get("class_path") or "LanguageModel")
    kind = stored if asked is None else import_model(asked)
    is_fine = start.path is None or kind is stored
    check(is_fine, f"model={asked} cannot apply to {start.path}, whose model is {class_path_of(stored)}: leave it out")
    return kind


def _go_on(ckpt_path: str, is_fitting: bool, runs: Path) -> Start:
    prefer = "last" if is_fitting else "best"
    path = resolve_checkpoint(ckpt_path, prefer, runs)
    if path.parent.parent == Path() or path.parent == Path():  # given from inside the run's folder
        path = path.absolute()
    is_in_checkpoints = path.parent.name == "checkpoints"
    run = path.parent.parent if is_in_checkpoints else path.parent
    config = run / "config.yaml"
    has_config = (is_in_checkpoints or path.name == WEIGHTS_NAME) and config.is_file()
    if is_fitting and not path.is_file() and (ckpt_path == "last" or (run / JOB_FILE).is_file()):
        say(f"{run} has no checkpoint yet: it starts from step 0")
        own = read_settings(str(config)) if has_config else {}
        start = _begin_with(own["init_from"], runs) if own.get("init_from") else Start()
        return replace(start, run=run, settings=own, config=config if has_config else None)
    path, content = open_checkpoint(ckpt_path, prefer, runs, path)
    has_optimizer = "optimizer_states" in content
    check(
        has_optimizer or not is_fitting,
        f"{path} holds weights alone, no run can go on from it: give the .ckpt of its run",
    )
    if is_fitting and has_config:
        return Start(path, content, run, read_settings(str(config)), config)
    settings: dict[str, Any] = {"model": dict(content["hyper_parameters"])}
    if has_config:
        stored = read_settings(str(config))
        missing = {"model", "data", "trainer"} - stored.keys()
        remedy = "restore it, or copy the checkpoint elsewhere"
        check(not missing, f"{config} has no settings of {sorted(missing)}: {remedy}")
        settings = {"model": stored["model"], "data": stored["data"], "trainer": {}}
        if "precision" in stored["trainer"]:
            settings["trainer"]["precision"] = stored["trainer"]["precision"]
    else:
        if (class_path := model_named_in(content, path)) is not None:
            settings["model"]["class_path"] = class_path
        if is_ours(content.get("data", {}).get("class_path", "")):  # another may run code when imported
            settings["data"] = content["data"]
    return Start(path, content, settings=settings)


def _begin_with(init_from: str, runs: Path) -> Start:
    """Let a new run have the shapes and, unless other data is chosen, the kind of text of the file it begins with."""
    if init_from in ("last", "best"):  # a process beside this one may have begun the newest already
        kept = f"checkpoints/{init_from}.ckpt"
        init_from = str(newest_run(runs, kept) / kept)
    init_from = expand_paths(init_from, "init_from")
    check(Path(init_from).exists(), f"init_from={init_from}: there is no such file; give a run, a .ckpt or a .pt")
    path, content = open_checkpoint(init_from, prefer="best")
    settings: dict[str, Any] = {}
    if (class_path := model_named_in(content, path)) is not None:
        settings["model"] = {"class_path": class_path}
    if (tokenizer := content.get("tokenizer")) is not None:
        text = {"class_path": "TextData", "init_args": {"tokenizer": "bytes" if tokenizer == "bytes" else "bpe"}}
        settings["data"] = text
    return Start(path, content, settings=settings, is_new_run=True)


def _keep_shapes(settings: Namespace, start: Start, model_class: type[LanguageModel], command: _Asked) -> None:
    """Give the model the options that its first weights depend on; raises InputError where a flag asks for others."""
    assert start.path is not None
    settings.init_from = str(start.path.absolute())
    stored, defaults = start.content["hyper_parameters"], model_class.network_options()
    may_change = model_class.network.options_open_to_a_new_run({**defaults, **stored})
    for name in sorted(model_class.fixed_options()):
        has, asked = stored.get(name, defaults[name]), settings.model[name]
        by_flag = _look_for([f"--model.{name}"], command.flags)[0][f"model.{name}"]
        if name in may_change and (by_flag or _found(command.files, "model", name)):
            continue
        check(
            asked == has or not by_flag,
            f"{name}={asked} cannot apply to the weights in {start.path}, which have {name}={has}: leave it out",
        )
        if asked not in (has, defaults[name]):
            say(f"model.{name} is {has}, which the weights in {start.path} have, and not {asked}")
        settings.model[name] = has


def _say_what_changed(start: Start, settings: Namespace, model_class: type[LanguageModel], is_fitting: bool) -> bool:
    """Say which settings differ from those that belong to the checkpoint; returns whether other data is meant.

    An option that came after the run was made had its default there.

    Raises:
        InputError: a run would go on with other data, on which its best loss means nothing, and that is not meant; or
            it has done more epochs than are asked for.
    """
    is_meant = bool(settings.allow_changed_data)
    check(is_fitting or not is_meant, "an evaluation takes any data: leave out --allow_changed_data")
    done, wanted = start.content.get("position", {}).get("epoch", 0), settings.trainer.max_epochs
    check(
        not is_fitting or wanted is None or not 0 <= wanted < done,
        f"trainer.max_epochs={wanted} is less than the {done} epochs that the run has done: ask for more",
    )
    of_text = ("path", "val_path", "glob", "text_field", "errors")  # which is told by its fingerprint
    harmless = ("batch_size", "num_workers", *(of_text if start.goes_on else []))
    before, now = dict(flat(start.settings)), dict(flat(settings.as_dict()))
    of_data = parameters_of(import_class(settings.data.class_path, "data"))
    for group, parameters in (("model", model_class.signature().parameters), ("data", of_data)):
        if group in start.settings:
            before = {f"{group}.{name}": parameter.default for name, parameter in parameters.items()} | before
    for name in sorted(before.keys() & now.keys() - {"config"}):
        stored, value = before[name], now[name]
        if value == stored or (start.run is None and not name.startswith(("model.", "data."))):
            continue
        if name == "data.tokenizer" and Path(str(value)).is_absolute():
            check(Path(value).is_file(), f"data.tokenizer={value}: there is no such file")
        if name.startswith("data.") and name.rpartition(".")[2] not in harmless:
            check(
                is_meant or not start.goes_on,
                f"{name}={value} cannot apply to a run that was trained with {stored}: leave it out, or say "
                "--allow_changed_data true, or copy its checkpoint elsewhere and go on from there",
            )
            is_meant = True
        say(f"{name} is now {value} (the run had {stored})")
    return is_meant


def _made(kind: type[Any], options: Mapping[str, Any]) -> Any:
    try:
        return kind(**options)
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise _not_made(error) from error


def _not_made(error: BaseException) -> InputError:
    return InputError(f"a class cannot be made with these settings: {error}")

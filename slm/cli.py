"""`train.py`: one run of `fit`, or of `validate`, `test` or `predict` with a checkpoint."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from slm.command.exit_codes import command_name, ends_in_one_line
from slm.command.launcher import count_devices, launch
from slm.command.settings import Command, read_command
from slm.command.streams import print_only_messages
from slm.command.trainer import check_trainer, new_trainer, shards_model
from slm.data import TokenData
from slm.data.token_data import check_shares
from slm.errors import InputError, check, leave_at_once
from slm.hardware import accelerator_kind, prepare_cpu
from slm.messages import say, silence_notices
from slm.run.checkpoint import RUNS, best_checkpoint, load_weights, read_checkpoint
from slm.run.control import Control
from slm.run.cores import gives_way
from slm.run.folder import RunFolder
from slm.run.job import end_with_holder
from slm.run.processes import Processes, launched_processes
from slm.run.sharding import give_weights
from slm.run.signals import Progress, stopped_by_signals
from slm.training.language_model import LanguageModel
from slm.watch.report import closing_report, evaluated
from slm.watch.tensorboard import show_in_tensorboard


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. One of several processes does not come back from it, but ends with it."""
    silence_notices()
    prepare_cpu()
    with ends_in_one_line(), stopped_by_signals() as progress:
        end_with_holder()
        processes = launched_processes()
        control = progress.control = Control(processes)
        processes.meet()
        control.connect()
        train(list(sys.argv[1:] if argv is None else argv), progress, is_own=argv is None)
    if processes.world_size > 1:
        leave_at_once(0)  # threads of gloo that live until the interpreter shuts down abort it, now and then


def train(argv: Sequence[str], progress: Progress, is_own: bool = False) -> None:
    """From a command line to a trained model: settings, model, data, Trainer, fit, report.

    Without a subcommand it is `fit`; `validate`, `test` and `predict` go the same way as far as the Trainer, which then
    evaluates. Model and data are made of the classes that `--model` and `--data` name and of their flags. Device and
    precision are flags of the Trainer: `--trainer.accelerator`, `--trainer.devices` and `--trainer.precision`. Several
    devices are trained on by as many processes, which a launcher starts: this very command, where there is no other.

    Args:
        argv: the command line.
        progress: is told how far it has come.
        is_own: whether `argv` is what this process was started with.
    """
    processes = progress.control.processes
    command = read_command(argv, processes)
    if command.subcommand == "predict" and command.settings.trainer.devices == "auto":
        command.settings.trainer.devices = 1  # which prints the windows in their order
    num_devices, num_nodes = count_devices(command.settings.trainer, processes)
    num_processes = num_devices * num_nodes
    check_trainer(vars(command.settings.trainer), num_processes)
    check_shares(command.settings.data.init_args.get("batch_size", num_processes), num_processes)
    check(num_processes == 1 or command.subcommand != "predict", "predict: use --trainer.devices 1")
    if num_processes > 1 and not processes.launcher:
        launch(num_devices, num_nodes, None if is_own else argv)
        return
    seed_everything(command.settings.seed_everything)
    gets_weights = shards_model(vars(command.settings.trainer), processes.world_size) and processes.rank > 0
    model = command.new_model(on_meta=gets_weights)  # rank 0 shares its own out
    data = command.new_data(model)
    settings = command.instantiate()  # with callbacks, loggers and plugins made
    if settings.trainer.devices == "auto":
        settings.trainer.devices = num_devices
    settings.trainer.num_nodes = num_nodes
    check_trainer(vars(settings.trainer))
    if command.start.content:
        take_over_weights(command, model, data)
    with processes.first_on_each_node(", which prepares the text"):
        data.setup()
    check_same_everywhere(processes, command, data)
    processes.open_group(accelerator_kind(str(settings.trainer.accelerator)))
    if command.subcommand != "fit":
        evaluate(command, new_trainer(command, settings, None, progress.control), model, data)
        return

    if not command.is_other_data_meant:
        command.start.check_same_data(data.fingerprint)
    for line in data.at_a_glance(sum(p.numel() for p in model.parameters())):
        say(line)
    runs = Path(settings.trainer.default_root_dir or "") / RUNS
    with nullcontext() if settings.trainer.fast_dev_run else RunFolder(command.start.run, runs, progress) as folder:
        if folder is not None:
            folder.prepare(command.start.training_state, command.text(), data.tokenizer, argv)
            if command.start.goes_on:
                say(f"{folder.path} goes on from {command.start.path}, step {command.start.steps}")
        trainer = progress.trainer = new_trainer(command, settings, folder, progress.control)
        print_only_messages()
        with gives_way():
            trainer.fit(model, data, ckpt_path=command.ckpt_path, weights_only=True)
        check_that_it_trained(command, trainer, folder)
        finish(command, trainer, model, data, folder, processes)


def check_same_everywhere(processes: Processes, command: Command, data: TokenData) -> None:
    """Say how the processes share a batch; raises InputError where one has other data or settings than rank 0."""
    own = {"data": data.fingerprint, "checkpoint": command.start.steps, "settings": command.fingerprint()}
    of_each = processes.from_all(own)
    for rank, others in enumerate(of_each):
        for name, value in others.items():
            expected = of_each[0][name]
            message = f"rank {rank} has other {name} than rank 0: {value}, not {expected}; give all nodes the same"
            check(value == expected, message)
    if (world_size := processes.world_size) > 1:
        batch_size = data.hparams["batch_size"]
        say(
            f"{world_size} processes share each batch of {batch_size} windows, {batch_size // world_size} on each: "
            "steps and learning rate mean what they do on one"
        )


def take_over_weights(command: Command, model: LanguageModel, data: TokenData) -> None:
    """Give the data the checkpoint's tokenizer, and the model its weights unless the Trainer will load them."""
    start = command.start
    assert start.path is not None
    if command.ckpt_path is None:
        load_weights(model.transformer, start.content, start.path)
    data.continue_with(start.content.get("tokenizer"))
    if start.is_new_run:
        say(f"begins with the weights of {start.path}")


def check_that_it_trained(command: Command, trainer: Trainer, folder: RunFolder | None) -> None:
    """Raise InputError for a new run without a step; say so where a run that goes on had nothing left to do."""
    is_new = folder is None or folder.is_new
    done_before = command.start.steps
    if is_new and trainer.global_step == 0:
        raise InputError("no step was trained: ask for one with --trainer.max_epochs, max_steps or max_time")
    if trainer.global_step == done_before:
        check(not is_new, f"{command.start.path} has done its {done_before} steps: ask for more of them")
        say(f"nothing was left to do: the run had already done its {done_before} steps; ask for more as below")


def finish(
    command: Command,
    trainer: Trainer,
    model: LanguageModel,
    data: TokenData,
    folder: RunFolder | None,
    processes: Processes,
) -> None:
    """Validate the best checkpoint, which adds no point to the curves, and print the report."""
    loggers, metrics = trainer.loggers, trainer.callback_metrics
    run = None if folder is None else folder.path
    best = None if run is None else best_checkpoint(run)
    has_best = processes.from_rank_zero(best is not None and best.is_file())
    reached: Mapping[str, Any] = metrics
    if has_best:
        assert best is not None
        trainer.logger = None
        if trainer.progress_bar_callback is not None:
            trainer.progress_bar_callback.disable()
        give_weights(model, read_checkpoint(best) if trainer.is_global_zero else None, best)
        [reached] = trainer.validate(model, data, verbose=False)
    if run is not None:
        hparams = {**data.hparams, **model.hparams}
        loss = reached["val/loss"] if has_best else None
        has_figure = command.settings.watch.loss_figure
        show_in_tensorboard(loggers, run, hparams, loss, data.optimum, trainer.global_step, has_figure)
    if trainer.is_global_zero:
        print(closing_report(trainer, data, reached, run, command_name()))


def evaluate(command: Command, trainer: Trainer, model: LanguageModel, data: TokenData) -> None:
    """Measure all held-out windows, or print the greedy next token of each, one a line."""
    say(f"{command.subcommand}: {command.start.path}")
    if command.subcommand == "predict":
        predictions: Any = trainer.predict(model, data, ckpt_path=command.ckpt_path, weights_only=True)
        print(*torch.cat(predictions).tolist(), sep="\n")
        return
    measure = trainer.validate if command.subcommand == "validate" else trainer.test
    measure(model, data, ckpt_path=command.ckpt_path, weights_only=True)
    say(evaluated(trainer, data, command.subcommand))


if __name__ == "__main__":
    main()

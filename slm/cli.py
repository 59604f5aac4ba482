"""`train.py`: one run of `fit`, or of `validate`, `test` or `predict` with a checkpoint."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from slm.command.exit_codes import command_name, ends_in_one_line
from slm.command.settings import Command, read_command
from slm.command.streams import print_only_messages
from slm.command.trainer import check_trainer, new_trainer
from slm.data import TokenData
from slm.errors import InputError, check
from slm.hardware import keep_freed_memory
from slm.messages import say, silence_notices
from slm.run.checkpoint import RUNS, best_checkpoint, load_weights
from slm.run.folder import RunFolder
from slm.run.signals import Progress, stopped_by_signals
from slm.training.language_model import LanguageModel
from slm.watch.report import closing_report, evaluated
from slm.watch.tensorboard import show_in_tensorboard


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    silence_notices()
    keep_freed_memory()
    with ends_in_one_line(), stopped_by_signals() as progress:
        train(list(sys.argv[1:] if argv is None else argv), progress)


def train(argv: Sequence[str], progress: Progress) -> None:
    """From a command line to a trained model: settings, model, data, Trainer, fit, report.

    Without a subcommand it is `fit`; `validate`, `test` and `predict` go the same way as far as the Trainer, which then
    evaluates. Model and data are made of the classes that `--model` and `--data` name and of their flags. Device and
    precision are flags of the Trainer: `--trainer.accelerator`, `--trainer.devices` and `--trainer.precision`.
    """
    command = read_command(argv)
    seed_everything(command.settings.seed_everything)
    model = command.new_model()
    data = command.new_data(model)
    settings = command.instantiate()  # with callbacks, loggers and plugins made
    check_trainer(vars(settings.trainer))
    if command.start.content:
        take_over_weights(command, model, data)
    data.setup()
    if command.subcommand != "fit":
        evaluate(command, new_trainer(command, settings, None), model, data)
        return

    if not command.is_other_data_meant:
        command.start.check_same_data(data.fingerprint)
    for line in data.at_a_glance(sum(p.numel() for p in model.parameters())):
        say(line)
    runs = Path(settings.trainer.default_root_dir or "") / RUNS
    with nullcontext() if settings.trainer.fast_dev_run else RunFolder(command.start.run, runs, progress) as folder:
        if folder is not None:
            folder.prepare(command.start.training_state, command.text(), data.tokenizer, argv)
        trainer = progress.trainer = new_trainer(command, settings, folder)
        print_only_messages()
        trainer.fit(model, data, ckpt_path=command.ckpt_path, weights_only=True)
        check_that_it_trained(command, trainer, folder)
        finish(command, trainer, model, data, folder)


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


def finish(command: Command, trainer: Trainer, model: LanguageModel, data: TokenData, folder: RunFolder | None) -> None:
    """Validate the best checkpoint, which adds no point to the curves, and print the report."""
    loggers, metrics = trainer.loggers, trainer.callback_metrics
    run = trainer.strategy.broadcast(None if folder is None else folder.path)
    best = None if run is None else best_checkpoint(run)
    has_best = best is not None and best.is_file()
    reached: Mapping[str, Any] = metrics
    if has_best:
        trainer.logger = None
        if trainer.progress_bar_callback is not None:
            trainer.progress_bar_callback.disable()
        [reached] = trainer.validate(model, data, ckpt_path=str(best), verbose=False, weights_only=True)
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
        check(trainer.world_size == 1, "predict prints the windows in their order: use --trainer.devices 1")
        predictions: Any = trainer.predict(model, data, ckpt_path=command.ckpt_path, weights_only=True)
        print(*torch.cat(predictions).tolist(), sep="\n")
        return
    measure = trainer.validate if command.subcommand == "validate" else trainer.test
    measure(model, data, ckpt_path=command.ckpt_path, weights_only=True)
    say(evaluated(trainer, data, command.subcommand))


if __name__ == "__main__":
    main()

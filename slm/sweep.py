"""Many runs from one command line: `python -m slm.sweep --model.learning_rate 0.001 0.003 --seed_everything 0 1 2`.

A flag of `train.py` may have several values. Every combination of values is trained, one after another, as an ordinary
run; with `--trials N` a search chooses N of them. The same command goes on with a sweep that was stopped, exactly, and
several processes or machines that have its folder share the work.
"""

import contextlib
import inspect
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from slm.cli import train
from slm.command.exit_codes import ends_in_one_line, python_name
from slm.command.flags import new_parser, parse_flags
from slm.command.settings import flat
from slm.errors import InputError, Stopped, check
from slm.hardware import accelerator_kind, describe, prepare_cpu
from slm.messages import say, silence_notices
from slm.research.cost import COMMAND, Cost, cost_of
from slm.research.points import Flags, Point, Points, Result, grid, key_of, runs_of, split
from slm.research.runs import SEEDS, UNTOLD, duration, group_table, read_run
from slm.research.search import DATA_SEED, SEED, Search, as_range, as_text, checked
from slm.run.signals import Progress, stopped_by_signals

SECONDS_TO_WAIT = 5.0
"""For points that other processes train."""
SAME_COST = (
    *SEEDS,
    *(f"model.{name}" for name in ("learning_rate", "min_learning_rate", "weight_decay", "warmup_steps")),
)
"""Settings that change nothing in what a run costs."""
SECONDS_TO_START = 5
COST_HEADER = ("| runs | the first of them | parameters | steps | ms/step | time of one |", "|---|---|---|---|---|---|")
HELP = ("-h", "--help")
_Options = TypeVar("_Options")


@dataclass(frozen=True)
class Options:
    """What a sweep takes beside the flags of train.py, of which each may have several values.

    Args:
        trials: how many points a search tries; null trains all of them. Only a search takes ranges, as in
            `--model.learning_rate 0.0003..0.03`.
        sampler: what chooses them, a class of optuna.samplers. TPESampler draws its first 10 at random.
        pruner: what gives up runs that are not promising, a class of optuna.pruners; NopPruner gives up none.
        dry_run: only says what it will cost.
    """

    trials: int | None = None
    sampler: str = "TPESampler"
    pruner: str = "MedianPruner"
    dry_run: bool = False

    def __post_init__(self) -> None:
        check(self.trials is None or self.trials >= 1, f"trials={self.trials} must be at least 1")
        for name in ("sampler", "pruner"):
            is_of_a_search = self.trials is None and getattr(self, name) != getattr(Options, name)
            check(not is_of_a_search, f"{name}={getattr(self, name)}: only a search has one, add --trials N")


def sweep(flags: Flags, options: Options) -> int:
    """Train the points of a sweep and print what they reached; returns how many failed."""
    folder = Points(runs_of(corner(flags, 0).command()))
    folder.make_folder()
    if options.trials is None:
        results, num_failed = train_all(folder, {folder.key(point): point for point in grid(flags)})
    else:
        search = Search(flags, folder, options.trials, options.sampler, options.pruner)
        results, num_failed = search.run(), search.num_failed
    if results:
        print(group_table([read_run(result.run) for result in results]))
        command = [python_name(), "-m", "slm.runs", str(folder.runs), "--figure", str(folder.runs / "sweep.png")]
        say(f"see them with {shlex.join(command)}")
    return num_failed


def train_all(folder: Points, points: Mapping[str, Point]) -> tuple[list[Result], int]:
    """Train each point that no process has trained yet; returns what they reached, and how many failed."""
    results: dict[str, Result] = {}
    failed: set[str] = set()
    is_waiting = False
    while left := [key for key in points if key not in results and key not in failed]:
        num_done = len(results) + len(failed)
        for key in left:
            point = points[key]
            with folder.claimed(key) as is_ours:
                if not is_ours or folder.is_trained_elsewhere(key):
                    continue
                if (found := folder.result(key)) is None:
                    say(f"{len(results) + len(failed) + 1} of {len(points)}: {point}")
                    start = time.perf_counter()
                    try:
                        found = folder.train(key, point)
                    except InputError as error:
                        say(f"failed: {error}")
                        failed.add(key)
                        continue
                    assert found is not None
                    reached = "no validation" if found.loss is None else f"{found.loss:.3f}"
                    say(f"{found.run}: {reached}, after {duration(time.perf_counter() - start)}")
                results[key] = found
        if len(results) + len(failed) == num_done:
            if not is_waiting:
                say(f"waiting for other processes, which train {len(left)} of {len(points)}")
            is_waiting = True
            time.sleep(SECONDS_TO_WAIT)
    return [results[key] for key in points if key in results], len(failed)


def cost_table(points: Sequence[Point]) -> str:
    """What points that have not ended yet cost on this machine, one row for all that cost the same, and their sum."""
    folder = Points(runs_of(points[0].command()))
    keyed = {folder.key(point): point for point in points}
    left = [point for key, point in keyed.items() if folder.result(key) is None]
    rows, seconds = [*COST_HEADER], 0.0
    for group in alike(left):
        cost = cost_of(group[0].argv)
        rows.append(f"| {len(group)} | {group[0]} | {_facts(cost)} |")
        seconds += len(group) * (cost.seconds + SECONDS_TO_START)
    ended = f", {len(keyed) - len(left)} others have ended" if len(left) < len(keyed) else ""
    return "\n".join([*rows, "", f"{_runs(len(left))}: {duration(seconds)} in one process{_about()}{ended}"])


def search_cost(flags: Flags, num_trials: int) -> str:
    """What a search costs, between what its trials at both ends of all flags do."""
    ends = [corner(flags, at) for at in (0, -1)]
    costs = [cost_of(point.argv) for point in ends]
    rows = [f"| | {point} | {_facts(cost)} |" for point, cost in zip(ends, costs, strict=True)]
    num_runs = num_trials * len(grid([(name, values) for name, values in flags if name == SEED]))
    low, high = (
        duration(num_runs * (seconds + SECONDS_TO_START)) for seconds in sorted(cost.seconds for cost in costs)
    )
    total = f"{_runs(num_runs)}: {low} to {high} in one process, less what is given up early or has ended{_about()}"
    return "\n".join([*COST_HEADER, *rows, "", total])


def alike(points: Sequence[Point]) -> list[list[Point]]:
    """Points that cost the same together; raises InputError where one cannot be trained."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        settings = dict(flat(point.command().settings.as_dict()))
        key = key_of({name: value for name, value in settings.items() if not name.startswith((*UNTOLD, *SAME_COST))})
        groups.setdefault(key, []).append(point)
    return list(groups.values())


def _facts(cost: Cost) -> str:
    return f"{cost.parameters:,} | {cost.steps:,} | {cost.milliseconds:.0f} | {duration(cost.seconds)}"


def _runs(number: int) -> str:
    return "1 run" if number == 1 else f"{number} runs"


def _about() -> str:
    return f", {SECONDS_TO_START} s of each to start; measured on {describe(torch.device(accelerator_kind('auto')))}"


def corner(flags: Flags, at: int) -> Point:
    """The point of a search at the first or the last value of each flag."""
    words, searched = [], []
    for name, values in flags:
        found = as_range(values)
        ends = [as_text(end) for end in (found.low, found.high)] if found else values
        words.append(f"{name}={ends[at]}" if ends else name)
        searched += words[-1:] if len(ends) > 1 else []
    return Point(tuple(words), tuple(searched))


def options_and_flags(module: str, kind: type[_Options], argv: Sequence[str]) -> tuple[_Options, Flags]:
    """A command line as the options that a command has of its own, and the flags of train.py in their order.

    Raises:
        InputError: an option with a wrong value, or a flag that is not for new runs.
    """
    parser = new_parser(module)
    parser.add_class_arguments(kind)
    names = [f"--{name}" for name in inspect.signature(kind).parameters]
    flags = split(argv)
    own = [f"{name}={_as_one(values)}" for name, values in flags if name in names]
    options = kind(**vars(parse_flags(parser, [*own, *(name for name, _ in flags if name in HELP)])))
    others = [(name, values) for name, values in flags if name not in names]
    for name, values in flags:
        twice = [value for value, count in Counter(values).items() if count > 1]
        check(not twice, f"{name} {twice and twice[0]}: it is given twice, leave one out")
        has_no_effect = name.removeprefix("--").startswith(UNTOLD)
        what = "it changes nothing in what a run reaches"
        check(len(values) < 2 or not has_no_effect, f"{name} {' '.join(values)}: {what}, give one value")
    for name in ("--ckpt_path", "--print_config"):
        check(name not in dict(others), f"{name}: only new runs are trained here, leave it out")
    return options, [*others, ("--trainer.enable_progress_bar", ["false"])]


def check_seeds(flags: Flags) -> None:
    """Raise InputError where a range of seeds is given: the best of a search in it would be the luckiest."""
    for name, values in flags:
        is_range = name in (SEED, DATA_SEED) and as_range(values) is not None
        check(not is_range, f"{name} {values and values[0]}: a seed has no range, give seeds one by one: {SEED} 0 1 2")


def _as_one(values: Sequence[str]) -> str:
    """An option's value; several are a list, and none is `true`."""
    return f"[{','.join(values)}]" if len(values) > 1 else values[0] if values else "true"


@contextlib.contextmanager
def stopping_goes_on() -> Iterator[None]:
    """Let a signal that ends the body say how to go on, and give its exit status."""
    try:
        with stopped_by_signals():
            yield
    except Stopped as stop:
        say(f"stopped by {signal.Signals(stop.signum).name}: the same command goes on")
        raise SystemExit(128 + stop.signum) from None


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    given = list(sys.argv[1:] if argv is None else argv)
    silence_notices()
    prepare_cpu()
    with ends_in_one_line():
        if given[:1] == [COMMAND]:
            train(given[1:], Progress())
            return
        options, flags = options_and_flags("sweep", Options, given)
        is_search = options.trials is not None
        ranges = [f"{name} {values[0]}" for name, values in flags if as_range(values)]
        check_seeds(flags)
        check(is_search or not ranges, f"{ranges and ranges[0]}: only a search chooses in a range, add --trials N")
        if options.dry_run:
            if is_search:
                checked(flags, options.sampler, options.pruner)
            print(search_cost(flags, options.trials or 0) if is_search else cost_table(grid(flags)))
            return
        with stopping_goes_on():
            failed = sweep(flags, options)
        check(not failed, f"{failed} of its runs failed: see above; the same command tries them again")


if __name__ == "__main__":
    main()

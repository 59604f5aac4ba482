"""What the runs of a folder reached, side by side: `python -m slm.runs`."""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from slm.command.exit_codes import ends_in_one_line
from slm.command.flags import new_parser, parse_flags, read_settings
from slm.command.settings import flat
from slm.errors import InputError, check
from slm.messages import say, silence_notices
from slm.run.checkpoint import RUNS
from slm.run.loading import import_model
from slm.watch.tensorboard import Curve, read_curves, seconds_drawn

UNTOLD = ("trainer.logger", "trainer.enable_progress_bar", "trainer.default_root_dir", "watch.")
"""Settings that change nothing in what a run reaches."""
COLUMNS = ("run", "val/loss", "bits/byte", "parameters", "tokens", "time", "tokens/s", "what differs")


@dataclass
class Run:
    """A run's folder, read.

    Attributes:
        path: the folder.
        settings: from its `config.yaml`, flat, by dotted name.
        curves: by tag.
        seconds: how long it was going.
        best_step: of its best validation, counted as TensorBoard does; None where it has none.
    """

    path: Path
    settings: Mapping[str, Any]
    curves: Mapping[str, Curve]
    seconds: float
    best_step: int | None = field(init=False)

    def __post_init__(self) -> None:
        losses = [(loss, step) for step, loss in self.curves.get("val/loss", []) if math.isfinite(loss)]
        self.best_step = min(losses)[1] if losses else None

    def last_step(self, num_steps: int) -> int | None:
        """The last validation of so many steps, counted likewise."""
        return max((step for step, _ in self.curves.get("val/loss", []) if step < num_steps), default=None)

    def best(self, tag: str) -> float | None:
        """What a curve was at the best validation; None where it has no point there."""
        return dict(self.curves.get(tag, [])).get(-1 if self.best_step is None else self.best_step)

    def tokens(self) -> int | None:
        """Tokens trained on, as far as was logged."""
        return round(self.curves["train/tokens"][-1][1]) if "train/tokens" in self.curves else None

    def figures(self, step: int | None) -> Iterator[tuple[str, str]]:
        """What it reached at the validation of a step, and what it took: names and values."""
        if step is None:
            yield "val/loss", "not known: its run has no validation of it"
        for tag in ("val/loss", "val/optimum", "val/perplexity", "val/accuracy", "val/bits_per_byte"):
            at = dict(self.curves.get(tag, []))
            if step in at:
                yield tag, f"{at[step]:.3f}"
        if step is not None:
            yield "optimizer steps", f"{step + 1:,}"
        if (tokens := self.tokens()) is not None:
            yield "tokens of the whole run", f"{tokens:,}"
        yield "time of the whole run", duration(self.seconds)

    def tokens_per_second(self) -> float | None:
        """The median over the logged stretches."""
        speeds = [value for _, value in self.curves.get("train/tokens_per_second", [])]
        return statistics.median(speeds) if speeds else None

    def num_parameters(self) -> int:
        """Of its network; raises InputError where the settings give no network."""
        kind = import_model(self.settings.get("model.class_path") or "LanguageModel")
        options = {
            name: self.settings.get(f"model.{name}", default) for name, default in kind.network_options().items()
        }
        try:
            with torch.device("meta"):
                return sum(weight.numel() for weight in kind.network(**options).parameters())
        except (InputError, TypeError) as error:
            raise InputError(f"{self.path / 'config.yaml'}: {error}; restore it") from error


def read_run(path: Path) -> Run:
    """Read a run's folder; raises InputError where its `config.yaml` cannot be used."""
    return Run(path, dict(flat(read_settings(str(path / "config.yaml")))), read_curves(path), seconds_drawn(path))


def table(runs: Sequence[Run]) -> str:
    """Runs in Markdown, the best first: by bits per byte where all have them, else by validation loss.

    A setting is named where the runs that have it differ in it, and once, below, if more than half of them agree. Runs
    without a loss come last.
    """
    have_bits = all(run.best("val/bits_per_byte") is not None for run in runs if run.best_step is not None)
    tag = "val/bits_per_byte" if have_bits else "val/loss"
    flags = {
        run.path: [_as_flag(name, value) for name, value in run.settings.items() if not name.startswith(UNTOLD)]
        for run in runs
    }
    counts = Counter(flag for given in flags.values() for flag in given)
    num_runs = Counter(flag.partition("=")[0] for given in flags.values() for flag in given)  # that have a setting
    usual = {flag for flag, count in counts.items() if count > num_runs[flag.partition("=")[0]] / 2}
    rows: list[tuple[str, ...]] = [COLUMNS]
    for run in sorted(runs, key=lambda run: (_or_last(run.best(tag)), _in_numbers(run.path.name))):
        differs = ", ".join(sorted(flag for flag in flags[run.path] if flag not in usual))
        rows.append(
            (
                run.path.name,
                _shown(run.best("val/loss"), ".3f"),
                _shown(run.best("val/bits_per_byte"), ".3f"),
                f"{run.num_parameters():,}",
                _shown(run.tokens(), ",d"),
                duration(run.seconds),
                _shown(run.tokens_per_second(), ",.0f"),
                differs.replace("|", r"\|"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = len(COLUMNS[-1])  # one long row makes no other wrap
    rows.insert(1, tuple("-" * width for width in widths))
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]
    others = [flag for flag in sorted(usual) if counts[flag] < num_runs[flag.partition("=")[0]]]
    return "\n".join([*lines, *(["", f"The others have {', '.join(others)}."] if others else [])])


def duration(seconds: float) -> str:
    """Like 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _or_last(value: float | None) -> float:
    return math.inf if value is None else value


def _in_numbers(name: str) -> list[str | int]:
    """A key that sorts version_2 before version_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _as_flag(name: str, value: Any) -> str:
    """A setting as it is given on the command line, a class by its last name."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{name.removesuffix('.class_path')}={text.rpartition('.')[2] if name.endswith('.class_path') else text}"


def _shown(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def show(runs: Path = RUNS) -> None:
    """Print what the runs of a folder reached, side by side, the best first.

    Args:
        runs: the folder that they are in.
    """
    found, unread = [], []
    for config in sorted(runs.glob("*/config.yaml")):
        try:
            run = read_run(config.parent)
            run.num_parameters()
            found.append(run)
        except InputError as error:
            unread.append(" ".join(str(error).split()))
    for line in unread:
        say(f"left out: {line}")
    check(
        bool(found),
        f"there is no run under {runs.absolute()}: start one with `python train.py`, or name another folder",
    )
    print(table(found))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = new_parser("runs")
    parser.add_function_arguments(show)
    parser.add_argument("folder", nargs="?", type=Path | None, help="the same as --runs")
    silence_notices()
    with ends_in_one_line():
        settings = parse_flags(parser, argv)
        show(settings.folder or settings.runs)


if __name__ == "__main__":
    main()

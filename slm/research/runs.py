"""What the runs of a folder reached: read, grouped, and side by side in a table or a figure."""

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

from slm.command.flags import read_settings
from slm.command.settings import flat
from slm.durable import replacing
from slm.errors import InputError, check
from slm.messages import say
from slm.run.loading import import_model
from slm.watch.tensorboard import Curve, read_curves, seconds_drawn

UNTOLD = ("trainer.logger", "trainer.enable_progress_bar", "trainer.default_root_dir", "watch.")
"""Settings that change nothing in what a run reaches."""
SEEDS = ("seed_everything", "data.seed")
COLUMNS = ("run", "val/loss", "bits/byte", "parameters", "tokens", "time", "tokens/s", "what differs")
MOST_CURVES = 10
"""In one figure, which has as many colours that are easily told apart."""
GROUP_COLUMNS = ("runs", "seeds", "val/loss", "deviation", "lowest to highest", *COLUMNS[2:6], "what differs")


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


def best_first(runs: Sequence[Run]) -> list[Run]:
    """By bits per byte where all have them, else by validation loss; those without a loss come last."""
    tag = _measure(runs)
    return sorted(runs, key=lambda run: (_or_last(run.best(tag)), _in_numbers(run.path.name)))


def table(runs: Sequence[Run]) -> str:
    """Runs in Markdown, the best first.

    A setting is named where the runs that have it differ in it, and once, below, if more than half of them agree.
    """
    differs, others = _differences(runs)
    rows = [
        (
            run.path.name,
            _shown(run.best("val/loss"), ".3f"),
            _shown(run.best("val/bits_per_byte"), ".3f"),
            f"{run.num_parameters():,}",
            _shown(run.tokens(), ",d"),
            duration(run.seconds),
            _shown(run.tokens_per_second(), ",.0f"),
            differs[run.path],
        )
        for run in best_first(runs)
    ]
    return _markdown([COLUMNS, *rows], others)


def group_table(runs: Sequence[Run]) -> str:
    """The same with one row for all runs that differ in nothing but their seeds.

    It has the number of those with a validation, the mean of their best losses, the standard deviation of one run's,
    and both ends. The other columns are means.
    """
    groups, (differs, others) = by_settings(runs), _differences(runs, without=SEEDS)
    rows = []
    for group in groups:
        losses = group.best("val/loss")
        num_tokens = [tokens for run in group.runs if (tokens := run.tokens()) is not None]
        rows.append(
            (
                group.name,
                str(len(losses)),
                _shown(_mean(losses), ".3f"),
                _shown(statistics.stdev(losses) if len(losses) > 1 else None, ".3f"),
                f"{min(losses):.3f} to {max(losses):.3f}" if losses else "",
                _shown(_mean(group.best("val/bits_per_byte")), ".3f"),
                f"{group.runs[0].num_parameters():,}",
                _shown(_mean(num_tokens), ",.0f"),
                duration(statistics.mean(run.seconds for run in group.runs)),
                differs[group.runs[0].path],
            )
        )
    return _markdown([GROUP_COLUMNS, *rows], others)


@dataclass
class Group:
    """Runs that differ in nothing but their seeds, and what else differs from other groups."""

    runs: list[Run]
    differs: str

    @property
    def name(self) -> str:
        """Of its runs, as in `version_0, 2`."""
        first, *others = sorted((run.path.name for run in self.runs), key=_in_numbers)
        return ", ".join([first, *(name.removeprefix("version_") for name in others)])

    def best(self, tag: str) -> list[float]:
        """What a curve was at the best validation of each of the runs that have one."""
        return [value for run in self.runs if (value := run.best(tag)) is not None]

    def curve(self, tag: str) -> list[tuple[int, list[float]]]:
        """The values of the runs that have the curve, at each step that all of them have."""
        curves = [dict(run.curves[tag]) for run in self.runs if tag in run.curves]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        return [(step, [curve[step] for curve in curves]) for step in steps]


def by_settings(runs: Sequence[Run]) -> list[Group]:
    """The groups, that of the lowest mean first."""
    differs, _ = _differences(runs, without=SEEDS)
    groups: dict[str, Group] = {}
    for run in sorted(runs, key=lambda run: _in_numbers(run.path.name)):
        settings = json.dumps(dict(_told(run, without=SEEDS)), sort_keys=True)
        groups.setdefault(settings, Group([], differs[run.path])).runs.append(run)
    tag = _measure(runs)
    return sorted(groups.values(), key=lambda group: _or_last(_mean(group.best(tag))))


def compared_by(curves: Mapping[str, Curve]) -> str:
    """The curve of a run that tells it from others: in bits per byte where it has that, else in nats per token."""
    return "val/bits_per_byte" if "val/bits_per_byte" in curves else "val/loss"


def _measure(runs: Sequence[Run]) -> str:
    """What runs are compared by: bits per byte where all that were validated have them, else the loss."""
    have_bits = all(run.best("val/bits_per_byte") is not None for run in runs if run.best_step is not None)
    return "val/bits_per_byte" if have_bits else "val/loss"


def _told(run: Run, without: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in run.settings.items() if not name.startswith((*UNTOLD, *without)))


def _differences(runs: Sequence[Run], without: Sequence[str] = ()) -> tuple[dict[Path, str], list[str]]:
    """By path, the settings in which a run is not like most, and what most are like where not all are."""
    flags = {run.path: [_as_flag(name, value) for name, value in _told(run, without)] for run in runs}
    counts = Counter(flag for given in flags.values() for flag in given)
    num_runs = Counter(flag.partition("=")[0] for given in flags.values() for flag in given)  # that have a setting
    usual = {flag for flag, count in counts.items() if count > num_runs[flag.partition("=")[0]] / 2}
    differs = {path: ", ".join(sorted(flag for flag in given if flag not in usual)) for path, given in flags.items()}
    return differs, [flag for flag in sorted(usual) if counts[flag] < num_runs[flag.partition("=")[0]]]


def _markdown(rows: Sequence[Sequence[str]], others: Sequence[str]) -> str:
    """A table whose last column is what differs, of which the first row is the header."""
    rows = [[*row[:-1], row[-1].replace("|", r"\|")] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = len(rows[0][-1])  # one long row makes no other wrap
    rows.insert(1, ["-" * width for width in widths])
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]
    return "\n".join([*lines, *(["", f"The others have {', '.join(others)}."] if others else [])])


def duration(seconds: float) -> str:
    """Like 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


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


def read_runs(runs: Path) -> list[Run]:
    """The runs of a folder; one that cannot be read is named on stderr. Raises InputError where there is none."""
    found = []
    for config in sorted(runs.glob("*/config.yaml")):
        try:
            run = read_run(config.parent)
            run.num_parameters()
            found.append(run)
        except InputError as error:
            say(f"left out: {' '.join(str(error).split())}")
    remedy = "start one with `python train.py`, or name another folder"
    check(bool(found), f"there is no run under {runs.absolute()}: {remedy}")
    return found


def draw(runs: Sequence[Run], file: Path) -> None:
    """Draw their validation losses, the mean of runs that differ in their seeds with a band from lowest to highest.

    Raises:
        InputError: no run has a validation, or matplotlib does not write such a file.
        NotWrittenError: it cannot be written.
    """
    from slm.watch.pictures import groups_figure

    drawn = [(group, curve) for group in by_settings(runs) if (curve := group.curve("val/loss"))]
    check(bool(drawn), f"figure={file}: no run has a validation to draw")
    if len(drawn) > MOST_CURVES:
        say(f"the figure shows the best {MOST_CURVES} of {len(drawn)}")
    curves = {f"{group.name}: {group.differs}".removesuffix(": "): curve for group, curve in drawn[:MOST_CURVES]}
    optima = {run.best("val/optimum") for group, _ in drawn[:MOST_CURVES] for run in group.runs}
    figure = groups_figure(curves, optima.pop() if len(optima) == 1 else None)
    kinds = figure.canvas.get_supported_filetypes()
    kind = file.suffix.removeprefix(".")
    check(kind in kinds, f"figure={file}: give a name that ends in {', '.join(sorted(kinds))}")
    with replacing(file) as content:
        figure.savefig(content, format=kind)
    say(f"the figure is in {file}")

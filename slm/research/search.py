"""A search among the values of flags, by Optuna: which point comes next, and which is not worth going on with.

The study is a journal in the folder of the sweep, so that several processes and machines take trials from it, and a
trial that was stopped goes on where it was.
"""

import contextlib
import re
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any

from slm.durable import lock
from slm.errors import InputError, check
from slm.messages import say
from slm.research.points import Flags, Point, Points, Result, grid, key_of
from slm.research.runs import compared_by
from slm.watch.tensorboard import read_curves

SEED, DATA_SEED = "--seed_everything", "--data.seed"
RANGE = re.compile(r"(-?\d+(?:\.\d+)?(?:e-?\d+)?)\.\.(-?\d+(?:\.\d+)?(?:e-?\d+)?)", re.IGNORECASE)
UNFIT = ("BruteForceSampler", "QMCSampler")
"""The one does what a sweep without `--trials` does, the other draws a sequence, where here trials are drawn alone."""
NUM_REHEARSED = 12
"""Trials after which samplers have begun to choose, and needed what they need."""
LOGARITHMIC = 10
"""A range is searched in its logarithm if its ends differ by so many times."""
SECONDS_TO_WAIT = 2.0
"""For the run of a trial whose process was killed, and that goes on alone."""


@dataclass(frozen=True)
class Range:
    """The values that a flag may take: all numbers between two, or all whole ones."""

    low: float
    high: float
    is_whole: bool

    @property
    def is_logarithmic(self) -> bool:
        """Whether its values are drawn evenly in their logarithms."""
        return self.low > 0 and self.high / self.low >= LOGARITHMIC


def as_range(values: Sequence[str]) -> Range | None:
    """The range that a flag is given as `LOW..HIGH`; None for anything else."""
    if len(values) != 1 or not (found := RANGE.fullmatch(values[0])):
        return None
    low, high = map(float, found.groups())
    check(low < high, f"{values[0]}: the lower end of a range comes first")
    return Range(low, high, is_whole=all(end.lstrip("-").isdigit() for end in found.groups()))


def as_text(value: float | int | str) -> str:
    """A value as a flag gives it."""
    return format(value, ".6g") if isinstance(value, float) else str(value)


class Search:
    """Trials of the values that flags are searched among.

    Args:
        flags: of `train.py`. One with several values, or with a range, is searched; the seeds, if they are several,
            are trained one after another in every trial, whose value is their mean.
        points: where the runs are.
        num_trials: in all, by all processes together.
        sampler: a class of `optuna.samplers`.
        pruner: a class of `optuna.pruners`.

    Raises:
        InputError: nothing is searched, Optuna is missing or has no such class.
    """

    def __init__(self, flags: Flags, points: Points, num_trials: int, sampler: str, pruner: str) -> None:
        self._flags, self._points, self._num_trials = flags, points, num_trials
        self._trial: Any = None
        self.num_failed = 0
        self._suggest = partial(suggest, flags)
        self._optuna = optuna = _optuna()
        self._sampler, made_pruner = checked(flags, sampler, pruner)
        journal = optuna.storages.journal.JournalFileBackend(str(points.folder / "study.journal"))
        self._name = key_of({"flags": [[name, list(values)] for name, values in flags]})
        self._storage = optuna.storages.JournalStorage(journal)
        self._study = optuna.create_study(
            storage=self._storage,
            study_name=self._name,
            pruner=made_pruner,
            load_if_exists=True,
        )

    def run(self) -> list[Result]:
        """Train trials until there are enough; returns what those that ended reached.

        One that fails is not tried again, but the next start of the command tries another in its place.
        """
        while (claim := self._next()) is not None:
            with claim:
                told = self._train(self._trial)
                self._study.tell(self._trial.number, **told)
                self.num_failed += told.get("state") == self._optuna.trial.TrialState.FAIL
        states = self._optuna.trial.TrialState
        if running := self._study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            say(f"trials that other processes still train: {len(running)}")
        complete = self._study.get_trials(deepcopy=False, states=(states.COMPLETE,))
        if complete:
            best, given_up = self._study.best_trial, self._study.get_trials(deepcopy=False, states=(states.PRUNED,))
            values = " ".join(f"{name}={as_text(value)}" for name, value in best.params.items())
            ended = f"trials trained to their end: {len(complete)}, given up: {len(given_up)}"
            say(f"{ended}; the best: {values} ({best.value:.3f})")
        keys = [self._points.key(point) for trial in complete for point in self._points_of(trial.params)]
        return [result for key in dict.fromkeys(keys) if (result := self._points.result(key)) is not None]

    def _next(self) -> contextlib.ExitStack | None:
        """Claim a trial that no process trains, one that was stopped, else a new one; None if there are enough."""
        states = self._optuna.trial.TrialState
        with (self._points.folder / f"{self._name}.lock").open("w") as alone:
            lock(alone, waits=True)
            for frozen in self._study.get_trials(deepcopy=False, states=(states.RUNNING,)):
                claim = contextlib.ExitStack()
                if claim.enter_context(self._points.claimed(f"{self._name}-{frozen.number}")):
                    self._sample_for(frozen.number)
                    study = self._storage.get_study_id_from_name(self._name)
                    trial = self._storage.get_trial_id_from_study_id_trial_number(study, frozen.number)
                    self._trial = self._suggest(self._optuna.trial.Trial(self._study, trial))
                    return claim
                claim.close()
            trials = self._study.get_trials(deepcopy=False)
            number, num_failed = len(trials), sum(trial.state == states.FAIL for trial in trials)
            if number - num_failed + self.num_failed >= self._num_trials:
                return None
            claim = contextlib.ExitStack()
            claim.enter_context(self._points.claimed(f"{self._name}-{number}"))
            self._sample_for(number)
            self._trial = self._suggest(self._study.ask())
            return claim

    def _sample_for(self, number: int) -> None:
        """Let what is drawn for a trial not depend on the process that draws it."""
        digest = blake2b(f"{self._name} {number}".encode(), digest_size=4).digest()
        self._study.sampler = self._sampler(seed=int.from_bytes(digest, "big"))

    def _points_of(self, params: Mapping[str, Any]) -> list[Point]:
        """The points of a trial, one for each seed."""
        chosen = {name: [as_text(value)] for name, value in params.items()}
        points = grid([(name, chosen.get(name, values)) for name, values in self._flags])
        varied = tuple(f"{name}={value}" for name, [value] in chosen.items())
        return [Point(point.argv, varied + point.varied) for point in points]

    def _train(self, trial: Any) -> dict[str, Any]:
        """Train a trial to its end, or until the pruner gives it up; returns what the study is told."""
        states = self._optuna.trial.TrialState
        losses: list[float] = []
        for number, point in enumerate(self._points_of(trial.params)):
            say(f"trial {trial.number + 1} of {self._num_trials}: {point}")

            try:
                key = self._points.key(point)
                with self._points.claimed(key, waits=True):
                    while self._points.is_trained_elsewhere(key):
                        time.sleep(SECONDS_TO_WAIT)
                    watched = self._is_hopeless if number == 0 else None  # seeds have no validations in common
                    result = self._points.result(key) or self._points.train(key, point, watched)
                if result is None:
                    say(f"trial {trial.number + 1} is given up, it is not promising")
                    return {"state": states.PRUNED}
                if result.loss is None:
                    raise InputError(f"{result.run} has no validation")
            except InputError as error:
                say(f"trial {trial.number + 1} failed: {error}")
                return {"state": states.FAIL}
            losses.append(result.loss)
            say(f"{result.run}: {result.loss:.3f}")
        return {"values": statistics.mean(losses)}

    def _is_hopeless(self, run: Path) -> bool:
        """Show the pruner the validations of a run, and ask it."""
        curves = read_curves(run)
        reported = self._study.get_trials(deepcopy=False)[self._trial.number].intermediate_values
        for at, (_, loss) in enumerate(curves.get(compared_by(curves), [])):
            if at not in reported:
                self._trial.report(loss, at)
        return bool(self._trial.should_prune())


def _optuna() -> ModuleType:
    try:
        import optuna
    except ImportError as error:
        raise InputError('a search needs the package optuna: pip install -e ".[sweep]"') from error
    return optuna


def checked(flags: Flags, sampler: str, pruner: str) -> tuple[Any, Any]:
    """The class of a sampler, and a pruner; raises InputError where a search of these flags cannot use them."""
    optuna = _optuna()
    several = [name for name, values in flags if name == DATA_SEED and len(values) > 1]
    check(not several, f"{DATA_SEED}: the best of a search in it would be the luckiest, give one")
    is_searched = any(as_range(values) or len(values) > 1 for name, values in flags if name != SEED)
    check(
        is_searched, "nothing is searched: give a flag several values, or a range: --model.learning_rate 0.0003..0.03"
    )
    kind = _class_of(optuna.samplers, "sampler", sampler)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rehearsal = optuna.create_study(sampler=kind(seed=0))
    try:
        for number in range(NUM_REHEARSED):
            rehearsal.tell(suggest(flags, rehearsal.ask()), float(number))
    except (ImportError, ValueError) as error:
        raise InputError(f"sampler={sampler} cannot be used here: {error}; give another") from error
    return kind, _class_of(optuna.pruners, "pruner", pruner)()


def suggest(flags: Flags, trial: Any) -> Any:
    """A trial with a value for each flag that is searched; one that was stopped keeps those that it has."""
    for name, values in flags:
        if (found := as_range(values)) is not None:
            kind, end = (trial.suggest_int, int) if found.is_whole else (trial.suggest_float, float)
            kind(name, end(found.low), end(found.high), log=found.is_logarithmic)
        elif len(values) > 1 and name != SEED:
            trial.suggest_categorical(name, list(values))
    return trial


def _class_of(module: ModuleType, setting: str, name: str) -> Any:
    kinds = {kind: getattr(module, kind) for kind in dir(module) if kind.endswith(setting.capitalize())}
    known = [kind for kind in kinds if not kind.startswith("Base") and kind not in UNFIT and _is_made(kinds[kind])]
    check(name in known, f"{setting}={name}: give one of {', '.join(known)}")
    return kinds[name]


def _is_made(kind: Any) -> bool:
    """Whether a class can be used without options."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some are new, and say so
            kind()
    except Exception:
        return False
    return True

"""A run's event files -> its curves."""

from collections.abc import Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

Curve = Sequence[tuple[int, float]]
"""Steps, and the values there."""


def read_curves(run: Path) -> dict[str, Curve]:
    """The curves in a run's folder by their tags, without the points that a killed process drew and a later one again.

    The steps are those of TensorBoard: how many were done before.
    """
    events = _read(run)
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()[SCALARS]}


def seconds_drawn(run: Path) -> float:
    """How long curves were drawn: from the start to the last point, added up over the times that the run was going."""
    seconds = 0.0
    for file in run.glob("events.out.tfevents.*"):
        events = _read(file)
        times = [point.wall_time for tag in events.Tags()[SCALARS] for point in events.Scalars(tag)]
        seconds += max(times) - events.FirstEventTimestamp() if times else 0.0
    return seconds


def _read(path: Path) -> EventAccumulator:
    events = EventAccumulator(str(path), size_guidance={SCALARS: 0})
    events.Reload()
    return events

"""Likeness of a concept while it is learned, and the time until it is reached."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

SHARE = 0.95      # of the likeness in question


@dataclass(frozen=True)
class Point:
    """seconds: of the processor, for training alone; likeness: share of the way from class noun to photos."""

    step: int
    seconds: float
    likeness: float


@dataclass
class Clock:
    """Processor seconds that training has taken. `paused` leaves out what is measured in between."""

    _began: float = field(default_factory=time.process_time)

    @property
    def seconds(self) -> float:
        return time.process_time() - self._began

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = time.process_time()
        yield
        self._began += time.process_time() - before


def curve(steps: Callable[[Callable[[int], None]], object], marks: Sequence[int],
          likeness: Callable[[int], float]) -> list[Point]:
    """Measures likeness during a training.

    Args:
        steps: Trains, and calls the given function with the number of steps after every step.
        marks: Steps after which likeness is measured.
        likeness: Measures the present state; its time does not count.

    Returns:
        One point for each mark that was reached.
    """
    points, wanted, clock = [], set(marks), Clock()

    def after(step: int) -> None:
        if step in wanted:
            seconds = clock.seconds
            with clock.paused():
                points.append(Point(step, seconds, likeness(step)))

    steps(after)
    return points


def seconds_until(points: Sequence[Point], level: float) -> float | None:
    """Seconds until a likeness is reached, on straight lines between the points; None if it is not.

    A point counts only if no later one falls below the level again, because a curve of few pictures is noisy.
    """
    before = Point(0, 0.0, 0.0)
    for place, point in enumerate(points):
        if all(later.likeness >= level for later in points[place:]):
            rise = point.likeness - before.likeness
            share = 1.0 if rise <= 0 else min(1.0, max(0.0, (level - before.likeness) / rise))
            return before.seconds + share * (point.seconds - before.seconds)
        before = point
    return None


def final(points: Sequence[Point]) -> float:
    """The mean likeness of the last two points."""
    last = [point.likeness for point in points[-2:]]
    return sum(last) / len(last)

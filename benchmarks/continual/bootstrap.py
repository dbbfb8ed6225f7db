"""Intervals of means over runs and concepts, and of differences between methods.

A figure is a table: one row per run, one column per concept (or pair of concepts). Another set of runs and
another set of concepts would give another mean, so both are resampled: rows and columns independently, as
in Owen's pigeonhole bootstrap (Annals of Applied Statistics, 2007), which is conservative. n rows are drawn
n - 1 times, which makes the variance of a mean unbiased for small n (Rao and Wu, JASA, 1988).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DRAWS = 4000
LEVEL = 0.95
FEWEST_RUNS = 3      # common to two methods, for a verdict
BETTER, WORSE, SAME, FEW = "better", "worse", "no difference", "too few runs"


@dataclass(frozen=True)
class Interval:
    """A mean and the percentile interval of its resampled means."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"mean": self.mean, "low": self.low, "high": self.high}


def _weights(count: int, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Shares `[draws, count]` of the resampled rows or columns; a single one has all the weight."""
    size = max(1, count - 1)
    return generator.multinomial(size, [1 / count] * count, draws) / size


def resampled_means(values: np.ndarray, generator: np.random.Generator, draws: int = DRAWS) -> np.ndarray:
    """Means `[draws]` of a table `[runs, concepts]` with resampled rows and columns."""
    runs, concepts = values.shape
    rows, columns = _weights(runs, draws, generator), _weights(concepts, draws, generator)
    return ((rows @ values) * columns).sum(1)


def interval(values: np.ndarray, generator: np.random.Generator, draws: int = DRAWS) -> Interval:
    """The mean of a table `[runs, concepts]` and its interval, for a single run that of concepts only."""
    means, tail = resampled_means(values, generator, draws), (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def difference(left: np.ndarray, right: np.ndarray, generator: np.random.Generator,
               draws: int = DRAWS) -> Interval:
    """The mean of `left - right` and its interval.

    Args:
        left, right: Tables `[runs, concepts]` of two methods. Rows have the same seed and order, columns the
            same concept, so that what both methods share cancels.
        generator: Draws the rows and columns.
        draws: Number of resampled means.
    """
    return interval(left - right, generator, draws)


def verdict(between: Interval, runs: int, higher_is_better: bool) -> str:
    """The word for a difference: an interval that contains 0 is no difference."""
    if runs < FEWEST_RUNS:
        return FEW
    if between.low <= 0 <= between.high:
        return SAME
    return BETTER if (between.low > 0) == higher_is_better else WORSE

"""Intervals: coverage on simulated runs and concepts, verdicts, and what is deterministic."""

from __future__ import annotations

import numpy as np
import pytest

from continual_concepts.benchmarks.continual.bootstrap import (
    BETTER,
    FEW,
    SAME,
    WORSE,
    Interval,
    difference,
    interval,
    resampled_means,
    verdict,
)


def generator(seed=0):
    return np.random.default_rng(seed)


def simulated(rng, runs, concepts, mean=0.5, by_run=0.03, by_concept=0.1, noise=0.05):
    return (mean + rng.normal(0, by_run, (runs, 1)) + rng.normal(0, by_concept, (1, concepts))
            + rng.normal(0, noise, (runs, concepts)))


@pytest.mark.parametrize(("runs", "concepts"), [(7, 10), (3, 10)])
def test_the_true_mean_is_in_most_intervals(runs, concepts):
    rng, inside = generator(1), 0
    for _ in range(200):
        found = interval(simulated(rng, runs, concepts), generator(), 500)
        inside += found.low <= 0.5 <= found.high
    assert inside >= 0.87 * 200


def test_the_variance_of_resampled_means_is_that_of_the_mean():
    """n - 1 draws of n make it unbiased: checked for runs alone, against many simulated means."""
    rng = generator(2)
    estimates = [resampled_means(rng.normal(0, 1, (4, 1)), generator(), 500).var() for _ in range(400)]
    assert np.mean(estimates) == pytest.approx(1 / 4, rel=0.1)


def test_what_two_methods_share_cancels_in_their_difference():
    rng = generator(3)
    base = simulated(rng, 7, 10)
    better = base + 0.02 + rng.normal(0, 0.005, base.shape)
    between = difference(better, base, generator())
    assert 0 < between.low < 0.02 < between.high < 0.03
    assert interval(better, generator()).low < interval(base, generator()).high      # these overlap


def test_equal_methods_are_seldom_told_apart():
    rng, wrong = generator(4), 0
    for _ in range(200):
        left, right = (simulated(rng, 5, 10, by_concept=0.0) for _ in range(2))
        wrong += verdict(difference(left, right, generator(), 500), 5, True) != SAME
    assert wrong <= 0.1 * 200


def test_constant_tables_have_no_width_and_one_run_has_that_of_concepts():
    found = interval(np.full((3, 4), 0.7), generator())
    assert (found.mean, found.low, found.high) == pytest.approx((0.7, 0.7, 0.7))
    single = interval(np.array([[0.2, 0.8, 0.5]]), generator())
    assert single.low < 0.5 < single.high


@pytest.mark.parametrize(("low", "high", "runs", "higher", "word"), [
    (0.1, 0.2, 3, True, BETTER), (-0.2, -0.1, 3, True, WORSE), (0.1, 0.2, 7, False, WORSE),
    (-0.2, -0.1, 7, False, BETTER), (-0.1, 0.1, 7, True, SAME), (0.0, 0.0, 7, True, SAME),
    (0.1, 0.2, 2, True, FEW),
])
def test_verdicts(low, high, runs, higher, word):
    assert verdict(Interval((low + high) / 2, low, high), runs, higher) == word


def test_the_same_generator_gives_the_same_interval():
    values = simulated(generator(5), 7, 10)
    assert interval(values, generator(6)) == interval(values, generator(6))
    assert interval(values, generator(6)) != interval(values, generator(7))

"""The benchmark's chart is drawn from a result, without a screen; the Pareto front against brute force."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from continual_concepts.benchmarks.continual.chart import draw, limits, pareto_front
from continual_concepts.benchmarks.continual.summary import summarise
from continual_concepts.tests.benchmarks.runs_made import levels, run

RUNS = [run("bound"), run("bound", seed=22),
        run("ewc", alone=(0.6, 0.5, 0.4, 0.3), combined=0.4, confused=0.3)]


def result(runs=RUNS, of=None):
    return summarise(runs, of or levels(), "bound")


def without_groups():
    bare = levels()
    for judge in bare["ceiling"]["judges"].values():
        judge["groups"] = judge["pairs"] = []
    return bare


def is_drawn(file):
    with Image.open(file) as picture:
        return picture.format == "PNG" and picture.width > 600 and np.asarray(picture.convert("L")).std() > 5


@pytest.mark.parametrize("made", [result(RUNS[:1]), result(of=without_groups())])
def test_a_picture_is_drawn(tmp_path, made):
    draw(tmp_path / "figure.png", made)
    assert is_drawn(tmp_path / "figure.png")
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.slow
def test_the_same_result_gives_the_same_picture(tmp_path):
    files = [tmp_path / f"{name}.png" for name in ("one", "two", "other")]
    for file, runs in zip(files, (RUNS, RUNS, [*RUNS[:2], run("ewc")]), strict=True):
        draw(file, result(runs))
    one, two, other = (file.read_bytes() for file in files)
    assert one == two != other and is_drawn(files[0])


def test_the_front_holds_what_nothing_beats():
    points = {"a": (1.0, 5.0), "b": (2.0, 4.0), "c": (1.5, 3.0), "d": (4.0, 1.0), "e": (3.9, 0.9)}
    assert pareto_front(points) == ["a", "b", "d"]
    assert pareto_front({"a": (1.0, 1.0), "b": (1.0, 1.0)}) == ["a", "b"]
    assert pareto_front({"a": (1.0, 2.0), "b": (1.0, 1.0)}) == ["a"]


def test_rounding_errors_do_not_fill_an_axis():
    assert limits(100 - 1e-6, 100 + 1e-6) == pytest.approx((90.5, 100.5))
    assert limits(-0.05, 0.05) == pytest.approx((-0.5, 9.5))
    assert limits(9.0, 11.0) == (5.0, 15.0) and limits(118.0, 120.0) == (114.0, 124.0)
    assert limits(10.0, 80.0) == (10.0, 80.0)

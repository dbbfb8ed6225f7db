"""The chart of runs of an earlier version is drawn from whatever figures there are, without a screen."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from continual_concepts.benchmarks.continual.earlier_chart import draw
from continual_concepts.benchmarks.continual.earlier_summary import summarise


def made(method, tasks=3, alone=False, seed=0, **more):
    found = {"method": method, "tasks": tasks, "order": 0, "seed": seed, "alone": alone, "steps": 5,
             "concepts": list("abc"[:tasks])}
    for name in ("image_alignment", "text_alignment", "just_learned", "retention", "forgetting"):
        found[name] = [0.5 + 0.1 * seed] * tasks
    return found | {"base_drift": 0.1, "a_mmd": 0.1, "f_mmd": 0.1, "trained_share": 0.1,
                    "bytes_per_concept": 1.0, "seconds_per_concept": 1.0} | more


COMBINED = {"multi_alignment": 0.4, "multi_present": 0.5, "confusion": 0.2, "pair_alignment": 0.3}


def is_drawn(file):
    with Image.open(file) as picture:
        return picture.format == "PNG" and picture.width > 600 and np.asarray(picture.convert("L")).std() > 5


@pytest.mark.parametrize("runs", [
    [made("cidm", tasks=1)],                                     # a single task has neither groups nor pairs
    [made("ewc", multi_alignment=0.3, multi_present=0.1)],       # groups, but no two of one class
    [made("cidm", alone=True)],                                  # nothing but the upper bound
])
def test_a_picture_is_drawn(tmp_path, runs):
    draw(tmp_path / "figure.png", runs, summarise(runs, "cidm", {}))
    assert is_drawn(tmp_path / "figure.png")
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_the_same_runs_give_the_same_picture(tmp_path):
    runs = [made("cidm", **COMBINED), made("cidm", seed=1, **COMBINED), made("ewc", seed=1, **COMBINED),
            made("cidm", alone=True)]
    for name in ("one.png", "two.png"):
        draw(tmp_path / name, runs, summarise(runs, "cidm", {}))
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert is_drawn(tmp_path / "one.png")
    other = [made("cidm", seed=1, **COMBINED), made("ewc", **COMBINED)]
    draw(tmp_path / "other.png", other, summarise(other, "cidm", {}))
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "other.png").read_bytes()

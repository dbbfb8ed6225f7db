"""The demo's concepts on several bases: the same figures for each, and finished parts are not repeated."""

from __future__ import annotations

import json

import pytest

from continual_concepts.benchmarks.__main__ import main
from continual_concepts.benchmarks.pretraining import on_bases
from continual_concepts.core.cli.demo_ways import TASKS, plan_of


def run_of(share: float) -> dict:
    return {"gap_closed": [share] * len(TASKS), "seconds": 1.0, **dict.fromkeys(on_bases.FIGURES, share)}


def test_the_mean_is_that_of_the_seeds_of_each_base(tmp_path, monkeypatch):
    asked = []

    def measured(plan):
        asked.append((plan.base, plan.seed, plan.alone, plan.steps))
        return run_of(0.1 * plan.seed + (plan.base == "embedded-128"))

    monkeypatch.setattr(on_bases, "measured", measured)
    arguments = ["bases", "--json", str(tmp_path / "bases.json"), "--bases", "embedded-64,embedded-128",
                 "--seeds", "1,3", "--pictures", "2", "--steps", "5"]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "bases.json").read_text())["bases"]
    assert result["embedded-64"]["pair_closed"] == pytest.approx(0.2)
    assert result["embedded-128"]["gap_closed"]["fido"] == pytest.approx(1.2)
    assert asked[0] == ("embedded-64", 1, 2, 5) and len(asked) == 4
    assert main(arguments) == 0 and len(asked) == 4


def test_steps_are_those_of_the_demo_on_each_base(tmp_path, monkeypatch):
    monkeypatch.setattr(on_bases, "measured", lambda plan: run_of(float(plan.steps)))
    arguments = ["--json", str(tmp_path / "bases.json"), "--bases", "embedded-64", "--seeds", "0"]
    assert main(["bases", *arguments]) == 0
    result = json.loads((tmp_path / "bases.json").read_text())["bases"]["embedded-64"]
    assert result["retained"] == result["steps"] == plan_of("embedded-64").steps


@pytest.mark.parametrize("flag, sentence", [
    (["--bases", "sd15"], "base 'sd15' is unknown"), (["--seeds", "a"], "seeds is 'a'"),
    (["--pictures", "0"], "pictures is 0"), (["--steps", "0"], "steps is 0")])
def test_bad_input_is_named(tmp_path, capsys, flag, sentence):
    assert main(["bases", "--json", str(tmp_path / "bases.json"), *flag]) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_figures_of_one_base(tmp_path):
    assert main(["bases", "--json", str(tmp_path / "bases.json"), "--bases", "embedded-64", "--seeds", "0",
                 "--pictures", "1", "--steps", "2"]) == 0
    row = json.loads((tmp_path / "bases.json").read_text())["bases"]["embedded-64"]
    assert row["retained"] == 1 and row["base_change"] == 0 and set(row["gap_closed"]) == set(TASKS)

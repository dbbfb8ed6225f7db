"""The committed runs stay readable: summarised again, they give the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from continual_concepts.benchmarks.continual.command import _finished
from continual_concepts.benchmarks.continual.runs import Run
from continual_concepts.benchmarks.continual.summary import summarise, table

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def flat(value, path="") -> dict:
    """Nested dicts and lists as one dict of numbers; texts are part of the keys."""
    if isinstance(value, str):
        return {f"{path} = {value}": 0}
    if not isinstance(value, dict | list):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {name: number for key, part in items for name, number in flat(part, f"{path}/{key}").items()}


@pytest.mark.parametrize("name", ["continual", "continual-50", "continual-ablation"])
def test_the_summary_of_committed_runs_is_the_committed_result(name):
    committed = json.loads((RESULTS / f"{name}.json").read_text())
    runs = [_finished(path) for path in sorted((RESULTS / f"{name}.cells").glob("*.json"))]
    assert flat(summarise(runs, committed["default"],
                          committed["untrained"])) == pytest.approx(flat(committed))
    assert table(committed).count("\n") == 1 + len(committed["methods"]) + bool(committed["upper_bound"])


def test_committed_runs_have_the_names_and_keys_of_today():
    for path in RESULTS.glob("continual*.cells/*.json"):
        stored = json.loads(path.read_text())
        method, _, overrides = stored["method"].partition("+")
        run = Run(method, stored["tasks"], stored["order"], stored["seed"], stored["alone"], overrides)
        assert path.name == f"{run.name}.json" and run.to_json().items() <= stored.items()

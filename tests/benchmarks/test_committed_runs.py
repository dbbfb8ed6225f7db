"""The committed runs stay readable: summarised again, they give the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from continual_concepts.benchmarks.continual.levels import file_of, read
from continual_concepts.benchmarks.continual.markdown import MARKER, sections
from continual_concepts.benchmarks.continual.runs import Run
from continual_concepts.benchmarks.continual.sequence_run import finished_run
from continual_concepts.benchmarks.continual.summary import summarise

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def flat(value, path="") -> dict:
    """Nested dicts and lists as one dict of numbers; texts are part of the keys."""
    if isinstance(value, str):
        return {f"{path} = {value}": 0}
    if not isinstance(value, dict | list):
        return {path: -1e9 if value is None else value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {name: number for key, part in items for name, number in flat(part, f"{path}/{key}").items()}


def runs_of(name, tasks):
    paths = sorted((RESULTS / f"{name}.cells").glob(f"*-n{tasks}-o*-s*.json"))
    return [finished_run(path) for path in paths]


def test_the_summary_of_committed_runs_is_the_committed_result():
    committed = json.loads((RESULTS / "continual.json").read_text())
    trials = {method: row["tuned"]["trials"] for method, row in committed["methods"].items()}
    levels = read(file_of(RESULTS / "continual.cells", committed["tasks"]))
    found = summarise(runs_of("continual", committed["tasks"]), levels, committed["default"],
                      lambda method: trials.get(method, 0))
    assert flat(found) == pytest.approx(flat(committed))


def test_sections_of_documents_are_those_of_the_committed_result():
    """No figure of these sections is typed by hand."""
    committed = json.loads((RESULTS / "continual.json").read_text())
    for document in (ROOT / "README.md", ROOT / "docs" / "benchmark.md"):
        text = document.read_text(encoding="utf-8")
        assert MARKER.search(text), f"{document.name} has no section"
        for found in MARKER.finditer(text):
            name = found.group(1)
            assert found.group(0) == (f"<!-- continual:{name} -->\n{sections(committed)[name]}\n"
                                      f"<!-- /continual:{name} -->"), f"{document.name}: {name}"


def test_committed_runs_have_the_names_and_keys_of_today():
    for path in RESULTS.glob("continual.cells/*-s*.json"):
        stored = json.loads(path.read_text())
        method, _, overrides = stored["method"].partition("+")
        run = Run(method, stored["tasks"], stored["order"], stored["seed"], stored["alone"], overrides)
        assert path.name == f"{run.name}.json" and run.to_json().items() <= stored.items()

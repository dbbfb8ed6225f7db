"""The file of tuning's result: damage, other bases and plans, and several processes."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from continual_concepts.benchmarks.__main__ import main
from continual_concepts.benchmarks.continual import tuned, tuning
from continual_concepts.benchmarks.continual.tuning_file import locked, stored_methods
from continual_concepts.core.errors import ConceptError

TASKS = 6      # of the tuning suite
TRIAL = {"stage": 0, "settings": {"lr": 0.1, "steps": 100}, "seed": 71, "objective": 0.5}


@pytest.fixture
def result():
    """A result without methods, on the base `abc`."""
    return tuning.Tuning([], Path(), {}, TASKS, {}).to_json("abc")


def test_other_methods_of_the_file_stay(tmp_path, result):
    path, methods = tmp_path / "tuning.json", {"bound": {"trials": [TRIAL]}}
    assert stored_methods(path, result) == {}
    path.write_text(json.dumps({**result, "methods": methods}))
    assert stored_methods(path, result) == methods


@pytest.mark.parametrize(("name", "value", "sentence"), [
    ("base", "xyz", "was made with base 'xyz', and this tuning has base 'abc'; name another file"),
    ("budget", 7, f"was made with budget 7, and this tuning has budget {tuning.BUDGET}"),
    ("objective", "the mean of something else, in many words",
     "was made with another objective, and this tuning has another objective"),
])
def test_a_result_of_another_base_or_plan_is_not_overwritten(tmp_path, result, name, value, sentence):
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps({**result, "methods": {}, name: value}))
    with pytest.raises(ConceptError, match=sentence):
        stored_methods(path, result)


@pytest.mark.parametrize("methods", [
    [], {"bound": []}, {"bound": {"chosen": {}}}, {"bound": {"trials": [{}]}},
    {"bound": {"trials": [{"stage": 0, "seed": 71, "settings": {"lr": "high"}}]}},
    {"bound": {"trials": [{"stage": 0, "seed": 71, "settings": {"lr": 0.1}, "objective": None}]}},
    {"bound": {"trials": [{"stage": 0, "seed": 71, "settings": {"lr": 0.1}, "objective": float("nan")}]}},
    {"bound": {"trials": [], "chosen": [1]}},
], ids=str)
def test_a_damaged_file_is_named_and_stays(tmp_path, result, methods):
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps({**result, "methods": methods}))
    with pytest.raises(ConceptError, match="tuning.json' is no result of the command tune; name another"):
        stored_methods(path, result)
    path.write_text('{"base": "abc", "meth')
    with pytest.raises(ConceptError, match="tuning.json' is no JSON file"):
        stored_methods(path, result)


def test_the_committed_result_can_be_read():
    content = json.loads(tuned.FILE.read_text()) if tuned.FILE.exists() else {"methods": {}}
    assert stored_methods(tuned.FILE, content) == content["methods"]


def test_the_command_refuses_a_damaged_file_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "_levels", lambda *_: pytest.fail("levels were measured"))
    few = tuning.tuning_concepts()[:1]      # drawing them all takes seconds
    for name in ("tuning_concepts", "tuning_styles"):
        monkeypatch.setattr(tuning, name, lambda: few)
    path = tmp_path / "tuning.json"
    path.write_text("[]")
    assert main(["tune", "--json", str(path), "--methods", "bound"]) == 1
    assert "tuning.json' holds no result" in capsys.readouterr().err and path.read_text() == "[]"


def test_processes_write_one_after_another(tmp_path):
    path, events = tmp_path / "new" / "tuning.json", []

    def write() -> None:
        with locked(path):
            events.append("second")

    with locked(path):
        other = threading.Thread(target=write)
        other.start()
        other.join(0.3)
        events.append("first")
    other.join()
    assert events == ["first", "second"]


@pytest.mark.parametrize(("chosen", "sentence"), [
    ({"lr": "high"}, "is no result of the command tune"),
    ({"lr": 0.1, "gone": 2}, "sets 'gone' of method 'bound', which has no such setting; tune this"),
])
def test_wrong_settings_of_the_file_are_named(tmp_path, monkeypatch, chosen, sentence):
    path = tmp_path / "tuning.json"
    monkeypatch.setattr(tuned, "FILE", path)
    path.write_text(json.dumps({"base": "abc", "methods": {"bound": {"chosen": chosen, "trials": []}}}))
    with pytest.raises(ConceptError, match=sentence):
        tuned.chosen_steps("bound", "abc")

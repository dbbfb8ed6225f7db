"""The command `gpu`: its time, what it leaves, and how it goes on. tests/host has its measurements."""

from __future__ import annotations

import json
import time

import pytest
import torch

from continual_concepts.benchmarks.__main__ import main
from continual_concepts.benchmarks.gpu import command

SPEED = {"steps_per_second": 2.0, "peak_gb": 3.0}


def fresh() -> dict:
    return {"device": "cpu", "small": True, "torch": torch.__version__, "parts": {}}


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds): a part that takes this long."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def part(seconds, row=None):
        def run() -> dict:
            now[0] += seconds
            return row or {"over_plain": 1.5, "regions": 4}

        return run

    return part


def test_no_part_begins_that_may_not_end_in_time(clock, tmp_path):
    file, result = tmp_path / "gpu.json", fresh()
    parts = {"short": clock(10), "long": clock(60), "another": clock(60), "last": clock(1)}
    lines = command.measured(result, parts, 120, file)
    assert list(result["parts"]) == ["short", "long"] and result["left"] == ["another", "last"]
    assert lines[-1] == "no time was left for: another, last"
    assert json.loads(file.read_text()) == result
    assert list(command._known(file, {"device": "cpu", "small": True})["parts"]) == ["short", "long"]
    command.measured(result, parts, 130, file)
    assert list(result["parts"]) == ["short", "long", "another", "last"] and result["left"] == []


def test_a_part_that_fails_does_not_end_the_others(clock, tmp_path):
    def failing() -> dict:
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    result = fresh()
    lines = command.measured(result, {"a": failing, "b": clock(1)}, 60, None)
    assert list(result["parts"]) == ["b"] and lines == [
        "b: 1.500 of a plain step with 4 regions", "a failed: OutOfMemoryError: CUDA out of memory"]


def test_the_lines_name_what_is_not_known():
    ours = {"slots": {**SPEED, "planned_gb": 2.9}, "peft": None}
    heads = {"sd15": {"0": {"over_plain": 1.0, "flash": True}, "4": {"over_plain": 1.2, "flash": False}},
             "seconds": 1.0}
    result = fresh() | {"parts": {"sd15": ours, "heads": heads}, "left": [], "failed": {}}
    assert command.lines(result) == [
        "sd15: 2.00 steps a second, peak 3.00 GB, planned 2.90 GB; PEFT is not installed",
        "heads: sd15 +0 1.00, +4 1.20* (* = without the flash kernel)"]
    result["parts"] = {"sd15": {"slots": {**SPEED, "peak_gb": None, "planned_gb": 2.9}, "peft": SPEED}}
    assert command.lines(result) == ["sd15: 2.00 steps a second, peak not known, planned 2.90 GB; PEFT's "
                                     "LoRA 2.00 steps a second, peak 3.00 GB"]


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--minutes", "0", "--small"], "minutes is 0; allowed: more than 0, up to 60"),
    (["--minutes", "nan", "--small"], "minutes is nan; allowed"),
    (["--steps", "0", "--small"], "steps is 0; allowed: 1 or more"),
    (["--small"], "is not a ComfyUI folder"),
    ([], "there is no graphics card; allowed without one: --small")])
def test_bad_flags_are_named(flags, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = ["gpu", "--json", str(tmp_path / "gpu.json"), "--comfyui", str(tmp_path), *flags]
    assert main(asked) == 1 and sentence in capsys.readouterr().err


def test_a_file_of_another_device_is_not_overwritten(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(fresh() | {"device": "a card"}))
    assert main(["gpu", "--json", str(file), "--comfyui", str(tmp_path), "--small"]) == 1
    assert "has a result whose device is 'a card', now it is 'cpu'" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "sentence"), [("no", "is no JSON file"), ("[1]", "holds no result")])
@pytest.mark.parametrize("command", ["gpu", "memory"])
def test_a_file_that_holds_something_else_is_refused(tmp_path, capsys, command, content, sentence):
    file = tmp_path / "result.json"
    file.write_text(content)
    more = ["--comfyui", str(tmp_path), "--small"] if command == "gpu" else []
    assert main([command, "--json", str(file), *more]) == 1
    assert sentence in capsys.readouterr().err and file.read_text() == content

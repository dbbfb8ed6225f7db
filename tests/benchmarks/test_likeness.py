"""Curves of likeness, the time until a level, and the command."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from continual_concepts.benchmarks.__main__ import main
from continual_concepts.benchmarks.continual import embedded
from continual_concepts.benchmarks.likeness import command
from continual_concepts.benchmarks.likeness.curves import Point, curve, final, seconds_until


def points(*pairs):
    return [Point(step, seconds, likeness) for step, (seconds, likeness) in enumerate(pairs, start=1)]


def test_time_is_read_between_points():
    found = points((1.0, 0.0), (2.0, 0.5), (3.0, 1.0))
    assert seconds_until(found, 0.25) == pytest.approx(1.5)
    assert seconds_until(found, 1.0) == pytest.approx(3.0)
    assert seconds_until(found, 1.1) is None
    assert seconds_until(points((2.0, 0.8)), 0.4) == pytest.approx(1.0)


def test_a_likeness_that_is_lost_again_does_not_count():
    assert seconds_until(points((1.0, 0.9), (2.0, 0.1), (3.0, 0.9)), 0.5) == pytest.approx(2.5)
    assert seconds_until(points((1.0, 0.9), (2.0, 0.1)), 0.5) is None
    assert final(points((1.0, 0.9), (2.0, 0.1), (3.0, 0.5))) == pytest.approx(0.3)


def work(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_measuring_takes_no_time_of_the_training():
    def train(after):
        for step in (1, 2, 3):
            work(0.02)
            after(step)

    def likeness(step):
        work(0.2)
        return step / 3

    found = curve(train, (1, 3), likeness)
    assert [(point.step, point.likeness) for point in found] == [(1, pytest.approx(1 / 3)), (3, 1.0)]
    assert 0.015 < found[0].seconds < 0.1 and 0.055 < found[1].seconds < 0.15


def run(trainer, *pairs, concept="a", seed=1):
    return {"trainer": trainer, "concept": concept, "seed": seed, "points": points(*pairs)}


def test_the_quickest_rate_of_a_trainer_counts():
    rows = command.summary([
        run("slots", (1.0, 1.0), (2.0, 1.0)),
        run("peft 0.1", (4.0, 1.0), (8.0, 1.0)), run("peft 0.2", (2.0, 1.0), (4.0, 1.0)),
        run("peft 0.4", (1.0, 0.4), (2.0, 0.4)),
        run("ComfyUI 0.1", (1.0, 0.2), (2.0, 0.3)), run("ComfyUI 0.2", (1.0, 0.4), (2.0, 0.4))])
    assert rows["slots"]["seconds_to_level"] == pytest.approx(0.95)
    assert (rows["peft"]["rate"], rows["peft"]["seconds_to_level"]) == ("0.2", pytest.approx(1.9))
    other = rows["ComfyUI"]
    assert (other["rate"], other["seconds_to_level"], other["reached"]) == ("0.2", None, 0)
    assert other["seconds_to_own"] == pytest.approx(0.95)


def test_most_runs_have_to_reach_the_level():
    both = [run("slots", (1.0, 1.0), (2.0, 1.0), concept=name) for name in "abc"]
    fast = [run("lora", (1.0, 1.0), (2.0, 1.0), concept=name) for name in "ab"]
    never = run("lora", (1.0, 0.1), (2.0, 0.1), concept="c")
    assert command.summary([*both, *fast, never])["lora"]["seconds_to_level"] == pytest.approx(0.95)
    assert command.summary([*both, fast[0], never, run("lora", (1.0, 0.2), concept="b")]
                           )["lora"]["seconds_to_level"] is None


@pytest.mark.slow
def test_the_command_compares_on_one_base(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedded, "SETTINGS", replace(embedded.SETTINGS, steps=1))
    for name, marks in (("MARKS", (1, 2)), ("OTHER_MARKS", (1, 2)), ("RATES", (1e-3,)), ("PICTURES", 1)):
        monkeypatch.setattr(command, name, marks)
    file = tmp_path / "likeness.json"
    assert main(["likeness", "--json", str(file), "--concepts", "1"]) == 0
    result = json.loads(file.read_text())
    assert {"slots", "lora"} <= set(result["trainers"]) and "final likeness" in capsys.readouterr().out
    for each in result["runs"]:
        assert [point["step"] for point in each["points"]] == [1, 2]
        assert 0 < each["points"][0]["seconds"] < each["points"][1]["seconds"]


def test_more_concepts_than_there_are(tmp_path, capsys):
    assert main(["likeness", "--json", str(tmp_path / "x.json"), "--concepts", "99"]) == 1
    assert "concepts is 99; allowed: 1 to 4" in capsys.readouterr().err

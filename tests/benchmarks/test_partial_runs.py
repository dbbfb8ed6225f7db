"""Tables and sentences of results where methods do not have the same runs, or where some have none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from continual_concepts.benchmarks.continual.chart import draw
from continual_concepts.benchmarks.continual.markdown import sections, setting
from continual_concepts.benchmarks.continual.summary import summarise
from continual_concepts.tests.benchmarks.runs_made import levels, run
from continual_concepts.tests.benchmarks.test_markdown import rows

FIRST, OTHERS = ((21, 21), (21, 22), (22, 21)), ((21, 23), (23, 21))
COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "continual.json"


def runs(method, places=FIRST, **figures):
    return [run(method, *place, **figures) for place in places]


def made(*groups, default="bound"):
    return summarise([each for group in groups for each in group], levels(), default)


def column(result, section, title):
    return {row["method"]: row[title] for row in rows(sections(result)[section])}


@pytest.fixture(scope="module")
def ablated():
    """The whole method is worse in the runs that it shares with its ablation, and better over all."""
    return made(runs("ewc", alone=(0.4,) * 4), runs("ewc", OTHERS, alone=(0.9,) * 4),
                runs("ewc+strength=0", alone=(0.5,) * 4))


def test_an_ablation_stands_below_the_whole_method_over_the_same_runs(ablated):
    found = rows(sections(ablated)["ablations"])
    assert [(row["method"], row["runs"]) for row in found] == [("ewc", "3"), ("ewc+strength=0", "3")]
    assert [row["alone"].split()[0] for row in found] == ["28.6", "42.9"]      # 57.1 over all five runs
    assert found[1]["against the whole method"].startswith("better: alone;")
    assert ablated["methods"]["ewc"]["alone"]["mean"] == pytest.approx(0.4 / 0.7)


def test_figures_of_both_differ_by_the_difference_that_is_judged():
    rng = np.random.default_rng(1)
    result = made([run("ewc", *place, alone=rng.random(4)) for place in (*FIRST, *OTHERS)],
                  [run("ewc+strength=0", *place, alone=rng.random(4)) for place in (*FIRST, (9, 9))])
    row = result["methods"]["ewc+strength=0"]
    ours, theirs = (row["same_runs"][name]["alone"]["mean"] for name in ("ablation", "whole"))
    assert row["against_whole"]["alone"]["difference"] == pytest.approx(ours - theirs)
    assert row["alone"]["mean"] != pytest.approx(ours)      # of four runs, one of which is not common
    assert column(result, "ablations", "runs") == {"ewc": "3", "ewc+strength=0": "3"}


def test_ablations_with_other_common_runs_have_a_row_of_the_whole_method_each():
    result = made(runs("ewc"), runs("ewc", OTHERS, alone=(0.9,) * 4), runs("ewc+strength=0"),
                  runs("ewc+strength=1"), runs("ewc+strength=2", OTHERS), runs("ewc+strength=3", ((9, 9),)))
    found = rows(sections(result)["ablations"])
    assert [(row["method"].removeprefix("ewc+strength="), row["runs"]) for row in found] == [
        ("3", "1"), ("ewc", "3"), ("0", "3"), ("1", "3"), ("ewc", "2"), ("2", "2")]
    assert found[0]["against the whole method"] == "no common runs"
    assert [row["alone"].split()[0] for row in found if row["method"] == "ewc"] == ["71.4", "100.0"]


def test_ablations_alone_are_said_to_be_alone(tmp_path):
    result = made(runs("ewc+strength=0"))
    found = sections(result)
    assert setting(result) == "4 tasks. No whole method has been run, only ablations."
    assert found["main"].startswith(setting(result)) and found["settings"] in setting(result)
    assert rows(found["ablations"])[0]["against the whole method"] == "the whole method has not been run"
    draw(tmp_path / "chart.png", result)
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_seeds_and_orders_of_ablations_are_not_those_of_the_methods(tmp_path):
    results = made(runs("bound"), runs("bound+rank=2", OTHERS)), made(runs("bound"))
    assert setting(results[0]).startswith("4 tasks; seeds 21, 22; orders 21, 22; 3 runs per method. ")
    for name, result in zip(("with", "without"), results, strict=True):      # neither in the chart's title
        draw(tmp_path / f"{name}.png", result)
    assert (tmp_path / "with.png").read_bytes() == (tmp_path / "without.png").read_bytes()


def test_a_claim_about_methods_without_common_runs_says_so():
    text = sections(made(runs("cidm"), runs("lora_m", OTHERS)))["claims"]
    assert text == "* cidm better than lora_m in *alone*: no common runs."
    text = sections(made(runs("cidm"), runs("lora_m", FIRST[:1])))["claims"]
    assert text.startswith("* cidm better than lora_m in *alone*: too few runs (")
    assert text.endswith(", 1 common run).")
    assert sections(made(runs("cidm")))["claims"].startswith("No two methods")
    no_way = summarise([*runs("cidm"), *runs("lora_m")], levels(floor=0.9), "bound")      # to real pictures
    assert sections(no_way)["claims"] == "* cidm better than lora_m in *alone*: cannot be compared."


def test_what_is_not_compared_with_the_default_does_not_look_worse():
    result = made(runs("bound"), runs("lora", OTHERS), runs("tara", alone=(0.5,) * 4))
    shown = column(result, "readme", "alone")
    assert shown == {"**bound**": "71", "lora": "71 (not compared)", "tara": "43"}
    for section in ("main", "judges"):
        against = column(result, section, "against the default")
        assert against["lora"] == "no common runs" and against["tara"].startswith("worse: alone")
        assert against["**bound**"] == against["*class nouns*"] == ""


def test_without_the_default_nothing_looks_compared():
    result = made(runs("lora"))
    found = sections(result)
    assert column(result, "readme", "alone") == {"lora": "71 (not compared)"}
    for section in ("main", "judges"):
        assert column(result, section, "against the default")["lora"] == "the default has not been run"
    assert found["bleed"] == "The default, `bound`, has not been run."


def test_methods_with_other_numbers_of_runs_show_them_and_those_of_the_comparison():
    result = made(runs("bound"), runs("bound", OTHERS), runs("lora", alone=(0.5,) * 4))
    for section in ("main", "judges", "readme"):
        assert column(result, section, "runs")["lora"] == "3", section
    against = column(result, "main", "against the default")["lora"]
    assert against.startswith("worse: alone") and against.endswith(" (3 common runs)")
    assert "5 or 3 runs per method." in setting(result)
    assert sections(result)["readme"].startswith("4 concepts, 5 or 3 runs, percent:")


def test_as_many_runs_of_other_seeds_are_not_the_same_runs():
    text = setting(made(runs("bound", FIRST), runs("lora", (*FIRST[:2], OTHERS[0]))))
    assert "3 runs per method, not the same for all." in text


def test_one_run_is_one_run():
    result = made(runs("bound", FIRST[:1]))
    assert setting(result) == ("4 tasks; seed 21; order 21; 1 run per method. "
                               "In brackets: 95 % intervals over concepts.")
    assert sections(result)["readme"].startswith("4 concepts, 1 run, percent:")
    assert "over runs and concepts, of a single run over concepts." in setting(
        made(runs("bound"), runs("lora", FIRST[:1])))


def test_results_of_earlier_versions_can_be_read():
    """They do not hold the figures of the whole method over the same runs, so these are not shown."""
    earlier = json.loads(COMMITTED.read_text())
    new = column(earlier, "ablations", "against the whole method")
    for row in earlier["methods"].values():
        row.pop("same_runs", None)
    old = column(earlier, "ablations", "against the whole method")
    assert old == {name: said for name, said in new.items() if "+" in name} and len(new) > len(old) > 0

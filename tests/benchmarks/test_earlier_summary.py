"""The summary of runs of an earlier version: means, spreads, plasticity, claims, the table.

Also for runs without groups or upper bound.
"""

from __future__ import annotations

import pytest

from continual_concepts.benchmarks.continual.earlier_summary import (
    orderings,
    run_figures,
    summarise,
    table,
    upper_levels,
)
from continual_concepts.core.errors import ConceptError


def made(method="cidm", ia=(0.8, 0.6), just=(0.8, 0.6), seed=0, order=0, alone=False, steps=100,
         names=("rex", "mimi"), **more):
    found = {"method": method, "tasks": len(ia), "order": order, "seed": seed, "alone": alone, "steps": steps,
             "concepts": list(names)}
    found |= {"image_alignment": list(ia), "just_learned": list(just), "text_alignment": [0.5] * len(ia)}
    found |= {"retention": [b / a for a, b in zip(just, ia, strict=True)],
              "forgetting": [a - b for a, b in zip(just, ia, strict=True)]}
    found |= {"a_mmd": 0.1, "f_mmd": 0.2, "base_drift": 0.0, "trained_share": 0.01,
              "bytes_per_concept": 2000.0}
    found |= {"seconds_per_concept": 3.0}
    return found | ({} if alone else {"multi_alignment": 0.4, "multi_present": 0.5, "pair_alignment": 0.3,
                                      "confusion": 0.25}) | more


def row(value, spread=0.0, runs=3, name="image_alignment"):
    held = {"mean": value, "std": spread} if name == "image_alignment" else value
    return {name: held, "spread": {name: spread}, "cells": runs}


def test_lists_become_means_and_the_worst_retention():
    found = run_figures(made(ia=(0.4, 0.9), just=(0.8, 0.9)))
    assert found["image_alignment"] == pytest.approx(0.65) and found["forgetting"] == pytest.approx(0.2)
    assert found["retention"] == pytest.approx(1.3 / 1.7) and found["worst_retention"] == pytest.approx(0.5)
    assert found["confusion"] == 0.25 and "plasticity" not in found and "bleed" not in found


def test_a_concept_that_was_never_learned_does_not_count_as_forgotten():
    found = run_figures(made(ia=(0.3, 0.9), just=(0.01, 0.9)))
    assert found["worst_retention"] == pytest.approx(1.0) and found["retention"] == pytest.approx(1.2 / 0.91)


@pytest.mark.parametrize(("just", "expected"), [
    ((0.8, 0.8, 0.4, 0.4), 0.5), ((0.4, 0.4, 0.8, 0.8), 2.0),
    ((0.8, 0.8, 0.1, 0.4, 0.4), 0.5),      # the middle of an odd number is in neither half
])
def test_plasticity_is_late_over_early(just, expected):
    names = tuple("abcde"[:len(just)])
    assert run_figures(made(ia=just, just=just, names=names),
                       dict.fromkeys(names, 0.8))["plasticity"] == pytest.approx(expected)


def test_plasticity_does_not_take_hard_concepts_for_late_ones():
    found = run_figures(made(just=(0.8, 0.4)), {"rex": 0.8, "mimi": 0.4})
    assert found["plasticity"] == pytest.approx(1.0)
    assert "plasticity" not in run_figures(made(ia=(0.8,), just=(0.8,), names=("rex",)), {"rex": 0.8})


def test_upper_levels_are_means_per_concept_whatever_the_order():
    runs = [made(just=(0.8, 0.6), alone=True), made(just=(0.5, 0.6), names=("mimi", "rex"), alone=True)]
    assert upper_levels(runs) == pytest.approx({"rex": 0.7, "mimi": 0.55})


def test_means_and_spreads_over_runs():
    found = summarise([made(ia=(0.8, 0.6)), made(ia=(0.6, 0.4), seed=1, order=1, base_drift=0.2),
                       made("ewc")], "cidm", {})
    mine = found["methods"]["cidm"]
    assert mine["cells"] == 2
    assert mine["image_alignment"] == pytest.approx({"mean": 0.6, "std": 0.02**0.5})
    assert mine["base_drift"] == pytest.approx(0.1)
    assert mine["spread"]["base_drift"] == pytest.approx(0.02**0.5)
    assert found["methods"]["ewc"]["spread"]["image_alignment"] == 0
    facts = {"tasks": 2, "seeds": [0, 1], "orders": [0, 1], "steps": 100, "default": "cidm"}
    assert {name: found[name] for name in facts} == facts
    assert found["upper_bound"] == {} and "plasticity" not in mine


def test_models_of_their_own_are_the_upper_bound_and_no_method():
    found = summarise([made(), made(alone=True, ia=(0.9, 0.8), just=(0.9, 0.8))], "cidm",
                      {"image_alignment": 0.1})
    assert found["methods"]["cidm"]["cells"] == 1
    assert found["upper_bound"]["image_alignment"]["mean"] == pytest.approx(0.85)
    assert found["methods"]["cidm"]["plasticity"] == pytest.approx((0.6 / 0.8) / (0.8 / 0.9))
    assert found["untrained"] == {"image_alignment": 0.1}


def test_figures_that_not_every_run_has_are_left_out():
    bare = {name: value for name, value in made(seed=1).items()
            if name not in ("confusion", "pair_alignment")}
    for runs in ([made(), bare], [bare, made()], [bare]):
        found = summarise(runs, "cidm", {})["methods"]["cidm"]
        assert "confusion" not in found and "confusion" not in found["spread"] and "multi_alignment" in found


def test_runs_of_other_steps_are_refused():
    with pytest.raises(ConceptError, match="100.*200"):
        summarise([made(), made(steps=200)], "cidm", {})
    with pytest.raises(ConceptError, match="no run"):
        summarise([], "cidm", {})


def claim(better, worse, name):
    found = {o["claim"]: o for o in orderings({better[0]: row(*better[1:], name=name),
                                               worse[0]: row(*worse[1:], name=name)})}
    return next(o for text, o in found.items() if text.startswith(better[0]))


@pytest.mark.parametrize(("good", "bad", "holds", "clear"), [
    ((0.8, 0.05), (0.6, 0.05), True, True), ((0.8, 0.15), (0.6, 0.1), True, False),
    ((0.6, 0.0), (0.8, 0.0), False, False), ((0.8, 0.0), (0.8, 0.0), False, False),
    # one run has no spread
    ((0.8, 0.0, 1), (0.6, 0.05), True, False), ((0.8, 0.05), (0.6, 0.0, 1), True, False),
])
def test_more_is_better_where_it_is(good, bad, holds, clear):
    found = claim(("cidm", *good), ("lora_m", *bad), "image_alignment")
    assert (found["holds"],
            found["clear"]) == (holds, clear) and found["difference"] == pytest.approx(good[0] - bad[0])


def test_less_is_better_for_forgetting():
    assert claim(("clora", 0.1, 0.01), ("finetune", 0.3, 0.01), "forgetting")["clear"]
    worse = claim(("clora", 0.3, 0.01), ("finetune", 0.1, 0.01), "forgetting")
    assert not worse["holds"] and "below finetune" in worse["claim"]


def test_claims_about_methods_that_did_not_run_are_not_made():
    assert orderings({"cidm": row(0.8), "cns": row(0.7)}) == []


def test_the_table_is_best_first_with_spreads_where_there_are_some():
    runs = [made(ia=(0.8, 0.7)), made(ia=(0.9, 0.8), seed=1), made("ewc", ia=(0.5, 0.4)),
            made(alone=True, ia=(0.9, 0.9))]
    lines = table(summarise(runs, "cidm", {})).split("\n")
    names = [line.split("|")[1].strip() for line in lines[2:]]
    assert names == ["*one model per concept*", "**cidm**", "ewc"]
    assert {line.count("|") for line in lines} == {lines[0].count("|")} and set(lines[1]) == {"|", "-"}
    head = [title.strip() for title in lines[0].split("|")]
    values = {line.split("|")[1].strip(): dict(zip(head, map(str.strip, line.split("|")), strict=True))
              for line in lines[2:]}
    assert values["**cidm**"]["IA"] == "80.0 ± 7.1" and values["ewc"]["IA"] == "45.0"
    assert values["ewc"]["kB"] == "2"
    assert values["*one model per concept*"]["confused"] == "" and values["ewc"]["confused"] == "25"


def test_the_smallest_seconds_count():
    found = summarise([made(seconds_per_concept=9.0), made(seed=1, seconds_per_concept=3.5)], "cidm", {})
    assert found["methods"]["cidm"]["seconds_per_concept"] == 3.5

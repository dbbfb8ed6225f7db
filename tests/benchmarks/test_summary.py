"""The summary of runs: shares, tables of runs and concepts, comparisons, bleed, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from continual_concepts.benchmarks.continual.summary import summarise
from continual_concepts.benchmarks.continual.tables import (
    Table,
    common,
    overall_share,
    share,
    spreads,
    table_of,
)
from continual_concepts.core.errors import ConceptError
from continual_concepts.tests.benchmarks.runs_made import CEILING, FLOOR, NAMES, levels, run

RUNS = ((21, 21), (21, 22), (22, 21))


def runs(method, **figures):
    return [run(method, order, seed, **figures) for order, seed in RUNS]


def as_share(score):
    return (score - FLOOR) / (CEILING - FLOOR)


def test_a_share_is_the_way_from_floor_to_ceiling():
    assert share(0.2, 0.2, 0.9) == 0 and share(0.9, 0.2, 0.9) == 1
    assert share(0.1, 0.2, 0.9) < 0 and np.isnan(share(0.5, 0.9, 0.9))


def test_tables_have_a_row_per_run_and_a_column_per_concept():
    found = table_of([run(order=22), run(order=21, alone=(0.2, 0.9, 0.55, 0.2))], levels(), "alone")
    assert found.runs == ((21, 21), (22, 21)) and found.columns == tuple(sorted(NAMES))
    first = dict(zip(found.columns, found.values[0], strict=True))
    assert first == pytest.approx({"rex": 0, "fido": 1, "mimi": 0.5, "chalk": 0})
    combined, confused = (table_of([run()], levels(), figure) for figure in ("combined", "confused"))
    assert combined.columns == ("fido", "mimi") and combined.values == pytest.approx(as_share(0.6))
    assert confused.columns == ("rex+fido",) and confused.values == pytest.approx(0.1)


def test_scores_of_a_concept_are_summed_over_groups_before_they_are_a_share():
    """A group whose floor is next to its ceiling does not decide."""
    made, known = run(), levels()
    group = made["judges"]["encoder"]["groups"][0]
    close = {**group, "concepts": [*group["concepts"], "chalk"], "alignment": [0.5, 0.5, 0.5]}
    made["judges"]["encoder"]["groups"] = [group, close]
    for row, score in (("floor", 0.3), ("ceiling", 0.31)):
        known[row]["judges"]["encoder"]["groups"].append({**close, "alignment": [score] * 3})
    table, way = table_of([made], known, "combined"), CEILING - FLOOR + 0.01
    found = dict(zip(table.columns, table.values[0], strict=True))
    score = dict(zip(group["concepts"], group["alignment"], strict=True))["mimi"]
    assert found["mimi"] == pytest.approx((score - FLOOR + 0.2) / way) and found["chalk"] == pytest.approx(20)
    together = (2 * (score - FLOOR) + 0.6) / (2 * way + 0.01)
    assert overall_share(made, known, "combined") == pytest.approx(together)


def test_another_order_of_learning_gives_the_same_columns():
    turned = run(names=NAMES[::-1], alone=(0.1, 0.2, 0.3, 0.4))
    found = table_of([turned], levels(), "alone")
    assert dict(zip(found.columns, found.values[0], strict=True))["rex"] == pytest.approx(as_share(0.4))


def test_figures_without_a_ceiling_are_left_out():
    bare = levels()
    for judge in bare["ceiling"]["judges"].values():
        judge["groups"] = []
    assert table_of([run()], bare, "combined") is None
    row = summarise(runs("bound"), bare, "bound")["methods"]["bound"]
    assert row["combined"] == {"cosine": pytest.approx(0.6)} and "mean" in row["alone"]


def test_common_rows_and_columns_are_in_the_same_order():
    left = Table(np.arange(6.0).reshape(3, 2), ((1, 1), (1, 2), (2, 1)), ("a", "b"))
    right = Table(np.arange(4.0).reshape(2, 2), ((2, 1), (1, 1)), ("b", "c"))
    one, other = common(left, right)
    assert one.runs == other.runs == ((1, 1), (2, 1)) and one.columns == other.columns == ("b",)
    assert one.values.tolist() == [[1.0], [5.0]] and other.values.tolist() == [[2.0], [0.0]]


def test_seeds_and_orders_are_told_apart():
    values = np.array([[0.1], [0.3], [0.1], [0.9]])
    found = spreads(Table(values, ((21, 21), (21, 22), (22, 21), (23, 21)), ("rex",)))
    assert found["seeds"] == pytest.approx(np.std([0.1, 0.3], ddof=1))
    assert found["orders"] == pytest.approx(np.std([0.1, 0.1, 0.9], ddof=1))
    assert spreads(Table(values[:1], ((21, 21),), ("rex",))) == {"seeds": None, "orders": None}


def test_the_result_has_the_agreed_form():
    result = summarise([*runs("bound"), *runs("cidm", alone=(0.5,) * 4)], levels(), "bound", lambda _: 9)
    assert {"tasks", "seeds", "orders", "default", "methods", "floor", "ceiling"} <= set(result)
    facts = {"tasks": 4, "seeds": [21, 22], "orders": [21, 22], "default": "bound"}
    assert {name: result[name] for name in facts} == facts
    for row in result["methods"].values():
        assert {"mean", "low", "high", "objects", "styles", "cosine"} <= set(row["alone"])
        assert all({"mean", "low", "high"} <= set(row[name]) for name in ("combined", "confused"))
        plain = ("retained", "base_change", "tfr", "a_mmd", "f_mmd", "bytes_per_concept",
                 "seconds_per_concept")
        assert all(isinstance(row[name], float) for name in plain)
        assert row["tuned"] == {"trials": 9, "steps": 200, "settings": {"lr": 0.002}}
        assert set(row["judges"]) == {"template"}
    assert result["floor"]["alone"] == {"mean": 0.0, "cosine": pytest.approx(FLOOR)}
    assert result["ceiling"]["combined"] == {"mean": 1.0, "cosine": pytest.approx(CEILING)}
    assert result["floor"]["confused"] == {"mean": 0.25} and result["ceiling"]["confused"] == {"mean": 0.0}


def test_objects_and_styles_are_parts_of_alone():
    row = summarise(runs("bound", alone=(0.9, 0.9, 0.9, 0.2)), levels(), "bound")["methods"]["bound"]["alone"]
    assert row["objects"] == pytest.approx(1) and row["styles"] == pytest.approx(0)
    assert row["mean"] == pytest.approx(0.75) and row["cosine"] == pytest.approx(0.725)


def test_better_and_worse_where_the_interval_says_so_and_no_difference_elsewhere():
    rng = np.random.default_rng(0)
    noisy = [run("ewc", *place, alone=0.7 + rng.normal(0, 0.1, 4)) for place in RUNS]
    result = summarise([*runs("bound"), *runs("lora", alone=(0.8,) * 4, combined=0.5, confused=0.3), *noisy],
                       levels(), "bound")
    lora, ewc = (result["methods"][name]["against_default"] for name in ("lora", "ewc"))
    assert (lora["alone"]["verdict"], lora["combined"]["verdict"], lora["confused"]["verdict"]) == (
        "better", "worse", "worse")
    assert lora["alone"]["difference"] == pytest.approx(0.1 / 0.7) and lora["alone"]["runs"] == 3
    assert ewc["alone"]["verdict"] == ewc["combined"]["verdict"] == "no difference"
    assert "against_default" not in result["methods"]["bound"]


def test_few_common_runs_give_no_verdict():
    result = summarise([*runs("bound"), run("cns", 21, 21, alone=(0.9,) * 4), run("cns", 5, 5)], levels(),
                       "bound")
    found = result["methods"]["cns"]["against_default"]["alone"]
    assert found["runs"] == 1 and found["verdict"] == "too few runs"


def test_forgetting_and_what_is_retained():
    lost = runs("finetune", just=(0.9, 0.9, 0.9, 0.9), alone=(0.55, 0.9, 0.9, 0.9))
    row = summarise(lost, levels(), "bound")["methods"]["finetune"]
    assert row["retained"] == pytest.approx(3.5 / 4) and row["retained_worst"] == pytest.approx(0.5)
    assert row["tfr"] == pytest.approx(0.35 / 3)      # a cosine, over all but the last concept
    unlearned = summarise(runs("ewc", just=(0.25, 0.9, 0.9, 0.9), alone=(0.2, 0.9, 0.9, 0.9)), levels(),
                          "bound")
    assert unlearned["methods"]["ewc"]["retained_worst"] == pytest.approx(1)


def test_claims_are_compared_with_intervals():
    found = summarise([*runs("cidm", alone=(0.8,) * 4), *runs("lora_m", alone=(0.6,) * 4),
                       *runs("cns"), *runs("finetune", just=(0.9,) * 4, alone=(0.5,) * 4)], levels(),
                      "bound")["claims"]
    assert {tuple(entry["claim"]): entry["verdict"] for entry in found} == {
        ("cidm", "lora_m", "alone"): "better", ("cns", "finetune", "forgotten"): "better",
        ("cns", "finetune", "lost"): "better"}


def test_bleed_is_counted_beyond_that_of_real_pictures():
    row = run()
    for figures in row["judges"].values():
        figures["bleed"][0][1] += 0.12      # rex's pictures look a little like fido
        figures["pairs"][0]["bleed"][0][1] += 0.2
    found = summarise([row], levels(), "bound")["methods"]["bound"]["bleed"]
    assert found["alone"][0][1] == pytest.approx(0.42) and found["alone_excess"] == pytest.approx(0.12 / 12)
    assert found["together_excess"] == pytest.approx(0.2 / 4)
    # asked for rex and for fido in one prompt; nobody asked for rex and mimi
    assert found["together"][0][:2] == pytest.approx([0.6, 0.5]) and found["together"][0][2] is None


def test_runs_of_one_method_with_other_steps_are_refused_and_methods_may_differ():
    with pytest.raises(ConceptError, match="'bound' have the steps 200 and 300"):
        summarise([run(), run(seed=22, steps=300)], levels(), "bound")
    with pytest.raises(ConceptError, match="settings"):
        summarise([run(), run(seed=22, settings={})], levels(), "bound")
    found = summarise([run(), run("ewc", steps=300)], levels(), "bound")
    assert found["methods"]["ewc"]["tuned"]["steps"] == 300
    with pytest.raises(ConceptError, match="no run"):
        summarise([], levels(), "bound")


def test_the_order_of_the_runs_and_other_methods_do_not_change_a_row():
    some = [*runs("bound", alone=(0.7, 0.6, 0.8, 0.5)), *runs("ewc")]
    assert summarise(some, levels(), "bound") == summarise(some[::-1], levels(), "bound")
    alone = summarise(some[:3], levels(), "bound")
    assert alone["methods"]["bound"] == summarise(some, levels(), "bound")["methods"]["bound"]


def test_concepts_with_banks_of_their_own_are_a_row_without_groups():
    alone = run("bound", alone=(0.8,) * 4) | {"alone": True}
    for figures in alone["judges"].values():
        figures["groups"] = figures["pairs"] = []
    result = summarise([*runs("bound"), alone], levels(), "bound")
    row = result["methods"]["bound alone"]
    assert row["alone"]["cosine"] == pytest.approx(0.8) and "combined" not in row and "confused" not in row
    assert row["bleed"]["together_excess"] is None and len(result["methods"]["bound"]["runs"]) == 3


def test_what_was_never_learned_has_no_retained_share():
    row = summarise(runs("ewc", alone=(0.1,) * 4), levels(), "bound")["methods"]["ewc"]
    assert row["retained"] is None and row["retained_worst"] is None
    json.dumps(row, allow_nan=False)

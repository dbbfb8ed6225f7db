"""Presets on the page: a new node begins with one, and graphs of before stay without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "01 Tour without a download.json"
ADD = """() => {
    app.graph.clear();
    const node = LiteGraph.createNode('ConceptLearner');
    app.graph.add(node);
}"""
STATE = """() => {
    const node = app.graph._nodes.find(node => node.type === 'ConceptLearner');
    const of = name => node.widgets.find(widget => widget.name === name);
    return {preset: of('preset').value, name: of('name').value, steps: of('steps').value,
            label: of('steps').label, disabled: Boolean(of('steps').disabled),
            advanced: node.widgets.filter(one => one.options?.advanced || one.advanced).map(one => one.name)};
}"""
CHOOSE = """preset => {
    const node = app.graph._nodes.find(node => node.type === 'ConceptLearner');
    const widget = node.widgets.find(widget => widget.name === 'preset');
    widget.value = preset;
    widget.callback?.(preset);
}"""


SET = """([name, value]) => {
    const node = app.graph._nodes.find(node => node.type === 'ConceptLearner');
    const widget = node.widgets.find(widget => widget.name === name);
    widget.value = value;
    widget.callback?.(value);
}"""
LABEL = """name => app.graph._nodes.find(node => node.type === 'ConceptLearner').widgets
    .find(widget => widget.name === name).label"""


@pytest.fixture(scope="module")
def page(open_page):
    return open_page()


def test_a_new_node_begins_with_a_preset_and_shows_its_values(page, tmp_path):
    page.evaluate(ADD)
    page.wait_for_timeout(500)
    state = page.evaluate(STATE)
    assert (state["preset"], state["name"], state["disabled"]) == ("person or animal", "", True)
    assert state["label"] == "steps = 750, 800 or 1200"
    assert {"steps", "lr", "seed", "if_known"} <= set(state["advanced"])
    assert not {"name", "class_noun", "preset", "effort"} & set(state["advanced"])
    page.screenshot(path=tmp_path / "learner.png")
    print(tmp_path / "learner.png")
    page.evaluate(CHOOSE, "as set")
    state = page.evaluate(STATE)
    assert (state["label"], state["disabled"]) == ("steps", False)
    assert not page.errors


def test_inputs_show_what_another_reader_and_a_concept_to_go_on_from_change(page):
    page.evaluate(ADD)
    page.wait_for_timeout(500)
    for name, value, labels in (("readable_by", "other programs", {"method": "method = lora"}),
                                ("if_known", "refine it", {"method": "method = the concept's",
                                                           "lr": "lr = the concept's"}),
                                ("if_known", "keep it", {"lr": "lr = 0.0001"}),
                                ("variant_of", "rex", {"token_lr": "token_lr = the concept's"})):
        page.evaluate(SET, [name, value])
        assert {input: page.evaluate(LABEL, input) for input in labels} == labels
    assert not page.errors


def test_a_graph_of_before_stays_without_a_preset(page):
    graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    node = next(node for node in graph["nodes"] if node["type"] == "ConceptLearner")
    node["widgets_values"] = node["widgets_values"][:-2]
    node["inputs"] = [entry for entry in node["inputs"] if entry["name"] not in ("preset", "effort")]
    node.pop("widgets_values_named", None)
    page.evaluate("graph => app.loadGraphData(graph)", graph)
    page.wait_for_timeout(1000)
    state = page.evaluate(STATE)
    assert (state["preset"], state["name"], state["steps"], state["disabled"]) == ("as set", "rex", 60, False)

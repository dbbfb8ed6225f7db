"""Advanced inputs are hidden in both of ComfyUI's renderers, and older graphs show what they showed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

WORKFLOWS = sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))
FIRST = next(path for path in WORKFLOWS if path.stem.startswith("02"))
ADD = """() => {
    app.graph.clear();
    app.graph.add(LiteGraph.createNode('ConceptLearner'));
}"""
STATE = """() => {
    const node = app.graph._nodes.find(node => node.type === 'ConceptLearner');
    return {shown: node.widgets.filter(one => !one.hidden).map(one => one.label || one.name),
            height: node.size[1], values: node.serialize().widgets_values.length,
            saved: node.serialize().showAdvanced};
}"""
PRESS = """() => {
    const node = app.graph._nodes.find(node => node.type === 'ConceptLearner');
    node.widgets.find(one => /advanced inputs$/.test(one.label)).callback();
}"""
LINK_SEED = """() => {
    const node = app.graph._nodes.find(node => node.type === 'ConceptLearner');
    const number = LiteGraph.createNode('PrimitiveInt');
    app.graph.add(number);
    number.connect(0, node, node.inputs.findIndex(input => input.name === 'seed'));
}"""
EVERYDAY = ["name", "class_noun", "captions", "preset", "effort", "Show advanced inputs"]


@pytest.fixture(scope="module")
def tab(open_page):
    return open_page()


@pytest.fixture
def page(tab):
    tab.render(False)
    tab.errors.clear()
    return tab


def state_of(page, script: str, *given) -> dict:
    page.evaluate(script, *given)
    page.wait_for_timeout(700)
    return page.evaluate(STATE)


def test_a_new_node_shows_its_everyday_inputs_and_a_button_shows_the_others(page, tmp_path):
    state = state_of(page, ADD)
    assert state["shown"] == EVERYDAY and state["saved"] is False
    page.screenshot(path=tmp_path / "hidden.png")
    opened = state_of(page, PRESS)
    assert len(opened["shown"]) == len(EVERYDAY) + 15 and opened["saved"] is True
    assert opened["shown"][-1] == "Hide advanced inputs" and opened["height"] > state["height"] + 300
    assert opened["values"] == state["values"]      # the button is not saved
    page.screenshot(path=tmp_path / "shown.png")
    print(f"screenshots: {tmp_path}")
    closed = state_of(page, PRESS)
    assert (closed["shown"], closed["height"]) == (EVERYDAY, state["height"])
    assert not page.errors


def test_a_text_over_a_wire_takes_one_line(page):
    boxes = """() => {
        const node = app.graph._nodes.find(node => node.type === 'ConceptLearner');
        return node.widgets.find(one => one.name === 'captions').computedHeight;
    }"""
    page.evaluate(ADD)
    page.evaluate("() => { app.graph._nodes[0].setSize([400, 900]); app.graph.setDirtyCanvas(true, true); }")
    page.wait_for_function(f"({boxes})() > 200")      # a busy page draws late
    link = LINK_SEED.replace("PrimitiveInt", "PrimitiveStringMultiline")
    page.evaluate(link.replace("'seed'", "'captions'"))
    page.wait_for_function(f"({boxes})() <= 24")
    assert not page.errors


def test_a_new_node_in_nodes_2_is_as_high_as_its_visible_inputs(page):
    page.render(True)
    page.evaluate(ADD)
    page.wait_for_timeout(1500)
    captions = page.locator("[data-node-id] textarea").first.bounding_box()
    assert captions["height"] < 120 * page.evaluate("app.canvas.ds.scale")
    assert not page.errors


def test_comfyuis_own_setting_shows_all_inputs(page):
    always = "on => app.extensionManager.setting.set('Comfy.Node.AlwaysShowAdvancedWidgets', on)"
    page.evaluate(always, True)
    try:
        shown = state_of(page, ADD)["shown"]
        assert len(shown) == len(EVERYDAY) + 14 and "seed" in shown      # without the button
    finally:
        page.evaluate(always, False)
    assert state_of(page, "() => {}")["shown"] == EVERYDAY and not page.errors


def test_a_copied_node_shows_what_its_original_shows(page):
    state_of(page, ADD)
    copy = """() => {
        const copied = app.graph._nodes[0].clone();
        app.graph.clear();
        app.graph.add(copied);
    }"""
    assert state_of(page, copy)["shown"] == EVERYDAY
    opened = state_of(page, PRESS)["shown"]
    assert state_of(page, copy)["shown"] == opened and len(opened) > len(EVERYDAY)
    assert not page.errors


def test_an_input_that_another_node_gives_is_shown(page):
    page.evaluate(ADD)
    page.wait_for_timeout(700)
    assert "seed" in state_of(page, LINK_SEED)["shown"]
    assert not page.errors


def test_a_graph_that_was_saved_with_all_inputs_in_sight_keeps_them(page):
    graph = json.loads(FIRST.read_text(encoding="utf-8"))
    learner = next(node for node in graph["nodes"] if node["type"] == "ConceptLearner")
    assert state_of(page, "graph => app.loadGraphData(graph)", graph)["shown"] == EVERYDAY
    del learner["showAdvanced"]
    assert len(state_of(page, "graph => app.loadGraphData(graph)", graph)["shown"]) == len(EVERYDAY) + 15


def test_the_learner_is_short_in_the_new_renderer_too(page):
    """The button is ComfyUI's own there. The height follows the inputs that are shown."""
    page.render(True)
    graph = json.loads(FIRST.read_text(encoding="utf-8"))
    page.evaluate("graph => app.loadGraphData(graph)", graph)
    page.wait_for_timeout(1500)
    height = page.evaluate("""() => {
        const node = app.graph._nodes.find(node => node.type === 'ConceptLearner');
        const seen = document.querySelector(`[data-node-id="${node.id}"]`).getBoundingClientRect();
        return seen.height / app.canvas.ds.scale;
    }""")
    assert height < 560
    assert page.get_by_text("Show advanced inputs").count() >= 1
    assert not page.errors

"""ComfyUI's "Convert to Subgraph" with each of our nodes, as templates link them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

GRAPHS = sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))
OURS = """node => {
    const known = LiteGraph.registered_node_types[node.type];
    return known?.nodeData?.category?.startsWith('continual concepts');
}"""
CONVERT = """async id => {
    const node = app.graph.getNodeById(id);
    app.canvas.deselectAll();
    app.canvas.select(node);
    await app.extensionManager.command.execute('Comfy.Graph.ConvertToSubgraph');
    await new Promise(done => setTimeout(done, 300));
    return app.graph._nodes.filter(each => each.subgraph).length;
}"""


@pytest.fixture(scope="module")
def tab(open_page):
    return open_page()


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])
def test_each_of_our_nodes_becomes_a_subgraph(tab, vue):
    tab.render(vue)
    tab.wait_for_timeout(800)
    tab.errors.clear()
    done, failed = set(), []
    for path in GRAPHS:
        graph = json.loads(path.read_text(encoding="utf-8"))
        tab.evaluate("graph => app.loadGraphData(graph)", graph)
        ours = tab.evaluate(f"() => app.graph._nodes.filter({OURS}).map(node => [node.id, node.type])")
        for number, kind in ours:
            if kind in done:
                continue
            done.add(kind)
            tab.evaluate("graph => app.loadGraphData(graph)", graph)
            if tab.evaluate(CONVERT, number) != 1:
                failed.append(kind)
    assert len(done) > 15 and not failed and not tab.errors

"""A new learner keeps its seed, so that a second run resumes or finds the concept learned."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow

CONTROL = "node => node.widgets.find(widget => widget.name === 'control_after_generate').value"


@pytest.fixture(scope="module")
def page(open_page):
    return open_page()


@pytest.mark.parametrize("kind, control", [
    ("ConceptLearner", "fixed"), ("ConceptFolderLearner", "fixed"), ("ConceptDemoPhotos", "fixed"),
    ("ConceptNeuronSelect", "fixed"), ("ConceptEvaluate", "fixed"), ("RegionalConceptSampler", "randomize")])
def test_a_new_node(page, kind, control):
    """Pictures are new at each run, as those of KSampler."""
    assert page.evaluate(f"kind => ({CONTROL})(LiteGraph.createNode(kind))", kind) == control


def test_a_workflow_keeps_what_it_says(page):
    found = page.evaluate(f"""async () => {{
        app.graph.clear();
        const node = LiteGraph.createNode('ConceptLearner');
        app.graph.add(node);
        node.widgets.find(widget => widget.name === 'control_after_generate').value = 'increment';
        await app.loadGraphData(app.graph.serialize());
        return ({CONTROL})(app.graph._nodes[0]);
    }}""")
    assert found == "increment" and not page.errors

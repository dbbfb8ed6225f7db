"""Load a bank, save it under another name, in ComfyUI's page: what then stands below, and in the lists."""

from __future__ import annotations

import pytest

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import save_bank

pytestmark = pytest.mark.slow

GRAPH = """name => {
    app.graph.clear();
    const [load, save] = ['ConceptBankLoad', 'ConceptBankSave'].map((type, index) => {
        const node = LiteGraph.createNode(type);
        app.graph.add(node);
        node.pos = [300 + 500 * index, 200];
        return node;
    });
    load.widgets[0].value = 'rex.safetensors';
    save.widgets.find(widget => widget.name === 'bank_name').value = name;
    load.connect(0, save, 0);
}"""
NAME = "name => { app.graph._nodes[1].widgets.find(widget => widget.name === 'bank_name').value = name; }"
RUN = """() => new Promise(done => {
    for (const kind of ['execution_success', 'execution_error']) {
        app.api.addEventListener(kind, () => done(kind), {once: true});
    }
    app.queuePrompt(0);
})"""
LISTS = """() => {
    const later = LiteGraph.createNode('ConceptBankLoad');
    return [app.graph._nodes[0], later].map(node => [...node.widgets[0].options.values]);
}"""


@pytest.fixture(scope="module")
def tab(open_page, server, layout, make_concept):
    folder = server.base / "output" / "concept_banks"
    folder.mkdir(exist_ok=True)
    save_bank(ConceptBank(layout).add(make_concept(layout, "rex")), folder / "rex.safetensors")
    return open_page()


@pytest.fixture(params=["classic", "vue"])
def page(tab, request, server):
    for stored in (server.base / "output" / "concept_banks").glob("again*"):
        stored.unlink()
    tab.render(request.param == "vue")
    tab.evaluate("() => app.refreshComboInNodes()")
    tab.errors.clear()
    yield tab
    assert not tab.errors


def run(page) -> None:
    assert page.evaluate(RUN) == "execution_success"
    page.wait_for_timeout(1200)


def test_notes_and_lists_follow_what_is_saved(page, request):
    name = "again-" + request.node.callspec.id
    page.evaluate(GRAPH, name)
    run(page)
    assert page.get_by_text(f"{name}.safetensors: <rex>").count() == 1
    for values in page.evaluate(LISTS):      # no R was pressed
        assert f"{name}.safetensors" in values and len(values) == len(set(values))
    run(page)      # nothing changed, so nothing runs
    assert page.get_by_text(f"{name}.safetensors: <rex>").count() == 1
    page.evaluate(NAME, name + "-2")
    run(page)
    assert page.get_by_text(f"{name}-2.safetensors: <rex>").count() == 1
    assert page.get_by_text(f"{name}.safetensors: <rex>").count() == 0


def test_a_bank_is_listed_where_a_subgraph_shows_the_input(page, request):
    """The subgraph's widget has a list of its own."""
    name = "again-promoted-" + request.node.callspec.id
    page.evaluate(GRAPH, name)
    page.evaluate("""async () => {
        const loader = LiteGraph.createNode('ConceptBankLoad');
        app.graph.add(loader);
        loader.pos = [300, 600];
        app.canvas.deselectAll(); app.canvas.select(loader);
        await app.extensionManager.command.execute('Comfy.Graph.ConvertToSubgraph');
    }""")
    page.wait_for_timeout(800)
    page.evaluate("""() => {
        const outer = app.graph._nodes.find(node => node.subgraph), inner = outer.subgraph._nodes[0];
        outer.subgraph.addInput('which', 'COMBO');
        outer.subgraph.inputNode.slots.at(-1).connect(inner.inputs[0], inner);
    }""")
    page.wait_for_timeout(500)
    lists = """() => app.graph._nodes.find(node => node.subgraph).widgets
        .filter(widget => widget.options?.values).map(widget => [...widget.options.values])"""
    [before] = page.evaluate(lists)
    run(page)
    [after] = page.evaluate(lists)
    assert f"{name}.safetensors" not in before and set(after) == {*before, f"{name}.safetensors"}


def test_a_bank_is_listed_when_another_workflow_was_opened_meanwhile(page, request):
    name = "again-tab-" + request.node.callspec.id
    page.evaluate(GRAPH, name)
    page.evaluate("""async () => {
        const done = new Promise(then => app.api.addEventListener('execution_success', then, {once: true}));
        await app.queuePrompt(0);
        await app.extensionManager.command.execute('Comfy.NewBlankWorkflow');
        await done;
    }""")
    page.wait_for_timeout(1200)
    listed = page.evaluate("[...LiteGraph.createNode('ConceptBankLoad').widgets[0].options.values]")
    assert f"{name}.safetensors" in listed

"""What the page shows of the notes below a node. It reads them as HTML."""

from __future__ import annotations

import html

import pytest

pytestmark = pytest.mark.slow

ADD = """type => {
    app.graph.clear();
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    node.pos = [400, 200];
    return String(node.id);
}"""
EVENT = "([name, detail]) => app.api.dispatchCustomEvent(name, detail)"
HEIGHT = "id => app.graph.getNodeById(id).size[1]"
SAVED = "id => app.graph.serialize().nodes.find(node => String(node.id) === id).size[1]"
LONG = "\n".join(f"warning {count}: photos in different places keep a concept apart from its background"
                 for count in range(4))


@pytest.fixture(scope="module")
def tab(open_page):
    return open_page()


@pytest.fixture(params=["classic", "vue"])
def page(request, tab):
    tab.render(request.param == "vue")
    tab.wait_for_timeout(800)
    tab.errors.clear()
    return tab


def add(page, kind: str) -> str:
    node = page.evaluate(ADD, kind)
    page.wait_for_timeout(1000)
    return node


def send(page, name: str, detail) -> None:
    page.evaluate(EVENT, [name, detail])
    page.wait_for_timeout(100)


def write(page, node: str, text: str, by: str | None = None) -> None:
    """As `progress.say` does. by: the node inside of a subgraph whose text it is."""
    send(page, "continual-concepts.note", {"node": node, "by": by or node})
    send(page, "progress_text", {"nodeId": node, "text": html.escape(text, quote=False)})
    page.wait_for_timeout(1200)


def run_again(page, node: str) -> None:
    send(page, "execution_start", {"prompt_id": "1"})
    send(page, "executing", node)
    page.wait_for_timeout(800)


def test_names_in_notes_are_shown(page):
    write(page, add(page, "ConceptBankSave"), "bank: <rex> & <mimi>\nsecond line")
    shown = page.get_by_text("bank: <rex> & <mimi>")
    assert shown.count() == 1 and "second line" in shown.inner_text() and not page.errors


@pytest.mark.parametrize("kind", ["ConceptBankSave", "CLIPTextEncode"])
def test_a_note_goes_when_its_node_runs_again(page, kind):
    """Also from a node of ComfyUI, where a sentence on its prompt may stand."""
    node = add(page, kind)
    before = page.evaluate(HEIGHT, node)
    write(page, node, LONG)
    assert page.get_by_text("warning 2").count() == 1
    if kind == "ConceptBankSave":      # a text box gives its own room away
        assert page.evaluate(HEIGHT, node) > before
    assert page.evaluate(SAVED, node) == pytest.approx(before, abs=2)      # saved without it
    run_again(page, node)
    assert page.get_by_text("warning 2").count() == 0 and not page.errors
    assert page.evaluate(HEIGHT, node) == pytest.approx(before, abs=2)


def test_a_node_that_is_told_twice_to_run_keeps_what_it_wrote_meanwhile(page):
    """The server repeats it when a page connects anew."""
    node = add(page, "ConceptBankSave")
    run_again(page, node)
    write(page, node, LONG)
    send(page, "executing", node)
    page.wait_for_timeout(500)
    assert page.get_by_text("warning 2").count() == 1


def test_the_text_of_another_extension_stays(page):
    node = add(page, "CLIPTextEncode")
    send(page, "progress_text", {"nodeId": node, "text": "price: 3 credits"})
    send(page, "executing", node)
    send(page, "execution_interrupted", {"node_id": node})
    page.wait_for_timeout(500)
    assert page.get_by_text("price: 3 credits").count() == 1


def test_a_note_has_the_height_that_it_needs(page):
    """ComfyUI's classic renderer shows two lines."""
    write(page, add(page, "ConceptBankSave"), LONG)
    shown = page.get_by_text("warning 2").bounding_box()
    whole = page.evaluate("id => app.graph._nodes[0].getBounding()", None)
    scale, offset = page.evaluate("[app.canvas.ds.scale, [...app.canvas.ds.offset]]")
    bottom = (whole[1] + whole[3] + offset[1]) * scale + page.evaluate(
        "app.canvas.canvas.getBoundingClientRect().top")
    assert shown["y"] + shown["height"] <= bottom + 2


def answering(answer: dict):
    return lambda route: route.fulfill(json=answer)


def begin_run(page, *nodes: str, cached: tuple[str, ...] = (), is_short: bool = False) -> None:
    """A run of these nodes begins. is_short: it is over before the server answers the page."""
    run = [0, "2", {node: {} for node in nodes}, {}, []]
    answers = {"queue": {"queue_running": [] if is_short else [run], "queue_pending": []},
               "history/2": {"2": {"prompt": run}} if is_short else {}}
    for path, answer in answers.items():
        page.route(f"**/api/{path}", answering(answer))
    send(page, "execution_start", {"prompt_id": "2"})
    page.wait_for_timeout(400)
    for path in answers:
        page.unroute(f"**/api/{path}")
    send(page, "execution_cached", {"nodes": list(cached), "prompt_id": "2"})


@pytest.mark.parametrize(("ended", "is_short"), [("execution_interrupted", False), ("execution_error", False),
                                                 ("execution_error", True)])
def test_after_an_interrupted_run_no_note_speaks_of_what_did_not_happen(page, ended, is_short):
    """Nodes that did not run lose their notes of earlier runs, those of other runs keep them. The node that
    stopped says so itself."""
    learner = add(page, "ConceptLearner")
    saves = [page.evaluate("""y => {
        const node = LiteGraph.createNode('ConceptBankSave'); app.graph.add(node); node.pos = [1000, y];
        return String(node.id);
    }""", y) for y in (100, 500, 900)]
    for name, save in zip(("waits", "cached", "other"), saves, strict=True):
        write(page, save, f"{name}.safetensors: <rex>")
    begin_run(page, learner, *saves[:2], cached=(saves[1],), is_short=is_short)
    send(page, "executing", learner)
    write(page, learner, "stopped: step 16 of 400")
    send(page, ended, {"node_id": learner, "prompt_id": "2", "executed": []})
    page.wait_for_timeout(500)
    shown = [page.get_by_text(text).count() for text in ("waits.saf", "cached.saf", "other.saf", "stopped: ")]
    assert shown == [0, 1, 1, 1]


def test_a_note_below_a_subgraph_goes_as_well(page):
    node = add(page, "ConceptBankSave")
    page.evaluate("""async id => {
        app.canvas.deselectAll(); app.canvas.select(app.graph.getNodeById(id));
        await app.extensionManager.command.execute('Comfy.Graph.ConvertToSubgraph');
    }""", node)
    page.wait_for_timeout(800)
    outer = page.evaluate("String(app.graph._nodes[0].id)")
    inner = page.evaluate("String(app.graph._nodes[0].subgraph._nodes[0].id)")
    before = page.evaluate(HEIGHT, outer)
    for _ in range(2):
        write(page, f"{outer}:{inner}", LONG)
        write(page, outer, LONG, f"{outer}:{inner}")
        assert page.get_by_text("warning 2").count() == 1
        assert page.evaluate(SAVED, outer) == pytest.approx(before, abs=2)
        begin_run(page, f"{outer}:{inner}", f"{outer}:99", cached=(f"{outer}:99",))      # a loader beside it
        send(page, "executing", f"{outer}:98")
        page.wait_for_timeout(300)
        assert page.get_by_text("warning 2").count() == 1
        send(page, "executing", f"{outer}:{inner}")
        page.wait_for_timeout(800)
        assert page.get_by_text("warning 2").count() == 0 and not page.errors
        assert page.evaluate(HEIGHT, outer) == pytest.approx(before, abs=2)
        assert page.evaluate(SAVED, outer) == pytest.approx(before, abs=2)


def test_two_instances_of_a_subgraph_share_what_stands_in_it(page):
    node = add(page, "ConceptBankSave")
    outer, other, inner = page.evaluate("""async id => {
        app.canvas.deselectAll(); app.canvas.select(app.graph.getNodeById(id));
        await app.extensionManager.command.execute('Comfy.Graph.ConvertToSubgraph');
        const outer = app.graph._nodes[0], other = LiteGraph.createNode(outer.type);
        app.graph.add(other);
        return [outer.id, other.id, outer.subgraph._nodes[0].id].map(String);
    }""", node)
    height = "id => app.graph._nodes[0].subgraph.getNodeById(id).size[1]"
    before = page.evaluate(height, inner)
    for each in (outer, other):
        write(page, f"{each}:{inner}", LONG)
    for each in (outer, other):
        send(page, "executing", f"{each}:{inner}")
    page.wait_for_timeout(800)
    assert page.evaluate(height, inner) == pytest.approx(before, abs=2) and not page.errors


def test_a_person_may_resize_a_node_while_it_writes(page):
    node = add(page, "ConceptBankSave")
    before = page.evaluate(HEIGHT, node)
    write(page, node, LONG)
    page.evaluate("""id => { const node = app.graph.getNodeById(id);
        node.setSize([node.size[0], node.size[1] + 150]); }""", node)
    page.wait_for_timeout(800)
    write(page, node, LONG + " again")
    write(page, node, "short")
    assert page.evaluate(SAVED, node) == pytest.approx(before + 150, abs=40)
    run_again(page, node)
    assert page.evaluate(HEIGHT, node) == pytest.approx(before + 150, abs=40)
    send(page, "progress_text", {"nodeId": node, "text": "of another extension"})
    page.wait_for_timeout(800)
    assert page.evaluate(SAVED, node) >= before


def test_a_resize_by_hand_between_a_text_and_its_measurement_is_kept(page):
    """Nodes 2.0 is measured 400 ms after a text. A learner writes more often than that."""
    node = add(page, "ConceptBankSave")
    before = page.evaluate(HEIGHT, node)
    write(page, node, "step 1 of 400")
    page.evaluate("""async id => {
        const node = app.graph.getNodeById(id), wait = ms => new Promise(done => setTimeout(done, ms));
        for (let step = 2; step < 12; step++) {
            app.api.dispatchCustomEvent('continual-concepts.note', {node: id, by: id});
            app.api.dispatchCustomEvent('progress_text', {nodeId: id, text: `step ${step} of 400`});
            node.setSize([node.size[0], node.size[1] + 20]);
            await wait(100);
        }
    }""", node)
    page.wait_for_timeout(1000)
    assert page.evaluate(SAVED, node) == pytest.approx(before + 200, abs=40)


def test_a_height_that_a_person_drags_is_kept_when_the_text_goes(page):
    node = add(page, "ConceptBankSave")
    write(page, node, LONG)
    before = page.evaluate(HEIGHT, node)
    x, y, scale = page.evaluate("""id => {
        const node = app.graph.getNodeById(id), {offset: [left, top], scale} = app.canvas.ds;
        const page = app.canvas.canvas.getBoundingClientRect();
        return [page.left + (node.pos[0] + node.size[0] + left) * scale,
                page.top + (node.pos[1] + node.size[1] + top) * scale, scale];
    }""", node)
    page.mouse.move(x - 4, y - 4)
    page.mouse.down()
    page.mouse.move(x - 4, y + 50, steps=5)
    page.mouse.move(x - 4, y + 100 * scale - 4, steps=5)
    page.mouse.up()
    page.wait_for_timeout(600)
    dragged = page.evaluate(HEIGHT, node)
    assert dragged == pytest.approx(before + 100, abs=20)
    run_again(page, node)
    write(page, node, LONG)
    run_again(page, node)
    assert page.evaluate(HEIGHT, node) == page.evaluate(SAVED, node) == pytest.approx(dragged, abs=2)


def test_a_picture_that_comes_with_a_text_is_no_part_of_its_height(page):
    """In Nodes 2.0 a node is measured some time after the text. It stays as high when the text goes."""
    node = add(page, "ConceptBankSave")
    send(page, "continual-concepts.note", {"node": node, "by": node})
    send(page, "progress_text", {"nodeId": node, "text": LONG})
    page.evaluate("""id => {
        const node = app.graph.getNodeById(id);
        requestAnimationFrame(() => requestAnimationFrame(() =>
            node.setSize([node.size[0], node.size[1] + 300])));
    }""", node)
    page.wait_for_timeout(1200)
    before = page.evaluate(HEIGHT, node)
    run_again(page, node)
    assert before - 200 < page.evaluate(HEIGHT, node) < before - 50


def test_a_text_of_a_workflow_that_is_not_shown_does_not_stand_below_another_node(page):
    """A workflow runs on when the page shows another one, in which another node has the same id."""
    node = add(page, "ConceptBankSave")
    page.evaluate("app.rootGraph.id = '7f3c1c9e-0000-4000-8000-000000000001'")
    for workflow, count in (("another", 0), (page.evaluate("app.rootGraph.id"), 1), (None, 1)):
        send(page, "continual-concepts.note", {"node": node, "by": node, "workflow": workflow})
        send(page, "progress_text", {"nodeId": node, "text": f"step of {workflow}"})
        page.wait_for_timeout(600)
        assert page.get_by_text(f"step of {workflow}").count() == count
    send(page, "continual-concepts.note", {"node": node, "by": node, "workflow": "another"})
    send(page, "progress_text", {"nodeId": node, "text": "step of another"})
    send(page, "progress_text", {"nodeId": node, "text": "price: 3 credits"})      # of another extension
    page.wait_for_timeout(600)
    assert page.get_by_text("price: 3 credits").count() == 1


def test_a_note_on_a_collapsed_node_leaves_no_height(page):
    node = add(page, "ConceptBankSave")

    def fold():
        page.evaluate("id => { app.graph.getNodeById(id).collapse(); }", node)
        page.wait_for_timeout(800)

    fold()
    fold()      # in Nodes 2.0 it is higher afterwards, with and without a note
    before = page.evaluate(HEIGHT, node)
    fold()
    write(page, node, LONG)
    fold()
    run_again(page, node)
    assert page.evaluate(HEIGHT, node) == pytest.approx(before, abs=2)
    assert page.evaluate(SAVED, node) == pytest.approx(before, abs=2)


def test_notes_of_cached_nodes_stay(page):
    node = add(page, "ConceptBankSave")
    write(page, node, "my-concepts.safetensors: <rex>")
    begin_run(page, node, "99", cached=(node,))
    send(page, "execution_interrupted", {"node_id": "99", "prompt_id": "2", "executed": []})
    assert page.get_by_text("my-concepts.safetensors: <rex>").count() == 1

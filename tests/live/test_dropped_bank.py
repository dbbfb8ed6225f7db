"""A share file is dropped onto ComfyUI's page: it is stored, a loader with it appears, and the graph runs."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.format import open_bank, save_bank
from continual_concepts.core.interop.sharing import share

pytestmark = pytest.mark.slow

DROP = """([files, x, y]) => {
    const transfer = new DataTransfer();
    for (const [name, content] of files) {
        transfer.items.add(new File([Uint8Array.from(atob(content), letter => letter.charCodeAt(0))], name));
    }
    for (const kind of ['dragenter', 'dragover', 'drop']) {
        document.elementFromPoint(x, y).dispatchEvent(new DragEvent(kind, {
            dataTransfer: transfer, bubbles: true, cancelable: true, clientX: x, clientY: y}));
    }
}"""
LOADERS = """() => app.graph._nodes.filter(node => node.type === 'ConceptBankLoad').map(
    node => [node.widgets.find(widget => widget.name === 'bank_name').value, ...node.pos])"""


@pytest.fixture(scope="module")
def file(tmp_path_factory, layout, make_concept) -> Path:
    path = tmp_path_factory.mktemp("shared") / "rex.safetensors"
    share(ConceptBank(layout).add(make_concept(layout, "rex")), "rex", path, "CC BY 4.0", "Ann")
    return path


@pytest.fixture(scope="module")
def tab(open_page):
    return open_page()


@pytest.fixture(params=["classic", "vue"])
def page(tab, request, server):
    """An empty graph in one of the renderers, and no stored bank."""
    for stored in (server.base / "output" / "concept_banks").glob("*.safetensors"):
        stored.unlink()
    tab.render(request.param == "vue")
    tab.evaluate("() => { app.graph.clear(); app.extensionManager.toast.removeAll(); }")
    tab.wait_for_function("!document.querySelector('.p-toast-message')")
    tab.errors.clear()
    yield tab
    assert not tab.errors


def drop(page, *files: tuple[str, bytes]) -> None:
    page.evaluate(DROP, [[[name, base64.b64encode(content).decode()] for name, content in files], 900, 500])


def told(page, text: str) -> None:
    page.locator(".p-toast").get_by_text(text).first.wait_for(timeout=20_000)


def banks(server) -> list[str]:
    return sorted(path.name for path in (server.base / "output" / "concept_banks").glob("*.safetensors"))


def test_a_share_file_becomes_a_loader_that_runs(page, server, file, tmp_path):
    drop(page, (file.name, file.read_bytes()))
    told(page, "rex.safetensors holds <rex>, licence CC BY 4.0, by Ann")
    page.screenshot(path=tmp_path / "dropped.png")
    print(tmp_path / "dropped.png")
    [[name, x, y]] = page.evaluate(LOADERS)
    assert name == "rex.safetensors" and banks(server) == [name]
    where = page.evaluate("([x, y]) => app.canvas.convertOffsetToCanvas([x, y])", [x, y])
    assert 500 < where[0] < 1300 and 200 < where[1] < 800      # near the pointer
    stored = open_bank(server.base / "output" / "concept_banks" / name)
    assert stored["rex"].digest() == open_bank(file)["rex"].digest()
    graph = page.evaluate("app.graphToPrompt().then(found => found.output)")
    loader = next(iter(graph))
    graph["show"] = {"class_type": "ConceptBankInspect", "inputs": {"bank": [loader, 0]}}
    assert "licence CC BY 4.0, by Ann" in server.run(graph)["outputs"]["show"]["text"][0]


def test_a_page_that_passes_the_file_alone_loads_it(page, server, file):
    """As pages of ComfyUI 0.8 and older do. None of them says where the file was dropped."""
    content = base64.b64encode(file.read_bytes()).decode()
    page.evaluate("""content => app.handleFile(
        new File([Uint8Array.from(atob(content), letter => letter.charCodeAt(0))],
                 'rex.safetensors'))""", content)
    told(page, "rex.safetensors holds <rex>")
    assert [loader[0] for loader in page.evaluate(LOADERS)] == banks(server) == ["rex.safetensors"]


def test_another_bank_of_the_name_is_not_replaced(page, server, file, layout, make_concept, tmp_path):
    drop(page, (file.name, file.read_bytes()))
    told(page, "rex.safetensors holds <rex>")
    other = tmp_path / "other.safetensors"
    save_bank(ConceptBank(layout).add(make_concept(layout, "max")), other)
    drop(page, ("rex.safetensors", other.read_bytes()), ("mimi.safetensors", other.read_bytes()))
    told(page, "rex (1).safetensors holds <max>")
    told(page, "mimi.safetensors holds <max>")
    assert banks(server) == ["mimi.safetensors", "rex (1).safetensors", "rex.safetensors"]
    loaders = page.evaluate(LOADERS)
    assert sorted(loader[0] for loader in loaders) == banks(server)
    assert len({tuple(loader[1:]) for loader in loaders[1:]}) == 2      # not on top of one another
    drop(page, (file.name, file.read_bytes()))      # the same file again is stored once
    page.wait_for_function("app.graph._nodes.length === 4")
    assert len(banks(server)) == 3


def test_what_is_no_whole_bank_is_refused(page, server, file):
    drop(page, ("rex.safetensors", file.read_bytes()[:-5]))
    told(page, "'rex.safetensors' cannot be used as a concept bank, because it is incomplete; get the file")
    drop(page, (".rex.safetensors", file.read_bytes()))
    told(page, "the file name '.rex.safetensors' is not allowed")
    assert not page.evaluate(LOADERS) and not banks(server)


def test_a_workflow_still_loads(page):
    page.evaluate("() => app.graph.add(LiteGraph.createNode('ConceptBankLoad'))")
    graph = page.evaluate("JSON.stringify(app.graph.serialize())")
    page.evaluate("app.graph.clear()")
    drop(page, ("flow.json", graph.encode()))
    page.wait_for_function("app.graph._nodes.length === 1")

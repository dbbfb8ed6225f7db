"""Row G13: the workflows as they open in both of ComfyUI's renderers. Sizes are those of the real page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
GRAPHS = sorted((ROOT / "workflows").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
OPEN = "([graph, name]) => app.loadGraphData(graph, true, true, name, {openSource: 'template'})"
SMALLEST_FONT = 8      # below this size, the classic renderer draws grey boxes in place of words
SMALL_WINDOW, WIDE_WINDOW = (1400, 880), (1920, 950)
LARGE = {"04", "08", "14", "15"}      # two or three pictures to compare, or models that prepare the photos
# Boxes of the nodes in the graph's coordinates: name, type, left, top, right, bottom
BOXES = """() => {
    const {scale, offset} = app.canvas.ds, canvas = app.canvas.canvas.getBoundingClientRect();
    return app.canvas.graph._nodes.map(node => {
        const seen = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
        const [x, y] = node.pos, [width, height] = node.size;
        const box = seen
            ? [(seen.left - canvas.left) / scale - offset[0], (seen.top - canvas.top) / scale - offset[1],
               (seen.right - canvas.left) / scale - offset[0], (seen.bottom - canvas.top) / scale - offset[1]]
            : [x, y - 30, x + width, y + height];
        return [`${node.title} (${node.id})`, node.type, ...box];
    });
}"""
GROUPS = """() => app.canvas.graph._groups.map(
    group => [group.title, 'group', group.pos[0], group.pos[1], group.pos[0] + group.size[0],
              group.pos[1] + group.size[1]])"""
# As after a run: a picture on each node of these types, and the learner's line of progress below its widgets
SHOW_PICTURES = """types => {
    for (const node of app.graph._nodes.filter(node => types.includes(node.type))) {
        const id = String(node.id);
        if (node.type === 'ConceptLearner') app.api.dispatchCustomEvent('progress_text', {
            nodeId: id, text: 'step 400 of 800, loss 0.1234, likeness 61.2, 12 min left'});
        app.api.dispatchCustomEvent('executed', {
            node: id, display_node: id, prompt_id: 'none',
            output: {images: [{filename: 'example.png', type: 'input', subfolder: ''}]}});
    }
    app.canvas.setDirty(true, true);
}"""
WITH_PICTURES = ["ConceptBankInspect", "ConceptEvaluate", "ConceptFolderLearner", "ConceptLearner",
                 "ConceptNeuronSelect", "ConceptPhotosLoad", "ConceptRegionsShow", "ElasticWeightAggregate",
                 "PreviewImage", "RegionalConceptSampler", "SaveImage"]
WITHOUT_PICTURE = """types => app.graph._nodes.filter(node => types.includes(node.type) && !node.imgs?.length
    && !document.querySelector(`[data-node-id="${node.id}"] img`)).map(node => node.title)"""
HIDDEN_TEXT = """() => [...document.querySelectorAll('.comfy-markdown-content')].filter(
    note => note.scrollHeight > note.clientHeight + 2).length"""


@pytest.fixture(scope="module")
def tab(open_page, server, comfyui_folder):
    example = comfyui_folder / "input" / "example.png"
    if not example.is_file():
        pytest.skip("this ComfyUI has no example.png")
    shutil.copy(example, server.base / "input")
    return open_page()


@pytest.fixture(params=["classic", "vue"])
def page(tab, request):
    tab.render(request.param == "vue")
    tab.renderer = request.param
    tab.errors.clear()
    return tab


@pytest.fixture(scope="module")
def small_window(open_page):
    page = open_page(*SMALL_WINDOW)
    page.render(False)
    return page


def overlapping(boxes: list) -> list[str]:
    return [f"{one[0]} and {other[0]}" for i, one in enumerate(boxes) for other in boxes[i + 1:]
            if one[2] < other[4] and other[2] < one[4] and one[3] < other[5] and other[3] < one[5]]


def is_inside(box: list, group: list) -> bool:
    return group[2] <= box[2] and group[3] <= box[3] and box[4] <= group[4] and box[5] <= group[5]


def outside_groups(boxes: list, groups: list) -> list[str]:
    """Nodes that no group holds completely. Notes stand alone."""
    return [box[0] for box in boxes if box[1] != "MarkdownNote"
            and not any(is_inside(box, group) for group in groups)]


def check(page) -> None:
    boxes, groups = page.evaluate(BOXES), page.evaluate(GROUPS)
    assert boxes and not overlapping(boxes)
    assert not overlapping([*groups, *(box for box in boxes if box[1] == "MarkdownNote")])
    assert not groups or not outside_groups(boxes, groups)


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_g13_workflows_are_laid_out(page, path, tmp_path):
    """Before and after a run, whose pictures make nodes taller."""
    page.evaluate(OPEN, [json.loads(path.read_text(encoding="utf-8")), path.stem])
    page.wait_for_timeout(1200)
    page.screenshot(path=str(tmp_path / f"{page.renderer}-{path.stem}.png"))
    print(f"screenshot: {tmp_path}")
    assert 14 * page.evaluate("app.canvas.ds.scale") >= SMALLEST_FONT
    check(page)
    assert page.renderer == "classic" or not page.evaluate(HIDDEN_TEXT)
    page.evaluate(SHOW_PICTURES, WITH_PICTURES)
    page.wait_for_timeout(1200)
    assert not page.evaluate(WITHOUT_PICTURE, WITH_PICTURES)
    page.screenshot(path=str(tmp_path / f"{page.renderer}-{path.stem}-after.png"))
    check(page)
    assert not page.errors


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_workflows_can_be_read_as_they_open(small_window, path):
    """The page fits all nodes into the window. Only the largest graphs need more than a small one."""
    width, height = WIDE_WINDOW if path.stem[:2] in LARGE else SMALL_WINDOW
    small_window.set_viewport_size({"width": width, "height": height})
    small_window.wait_for_timeout(500)
    small_window.evaluate(OPEN, [json.loads(path.read_text(encoding="utf-8")), path.stem])
    small_window.wait_for_timeout(1200)
    assert 14 * small_window.evaluate("app.canvas.ds.scale") >= SMALLEST_FONT


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_g13_sibling_blueprints_are_laid_out(page, path, tmp_path):
    """The nodes inside, as one sees them after a double-click."""
    page.evaluate(OPEN, [json.loads(path.read_text(encoding="utf-8")), path.stem])
    page.wait_for_timeout(1000)
    page.evaluate("() => app.canvas.setGraph([...app.graph.subgraphs.values()][0])")
    page.wait_for_timeout(800)
    page.evaluate("() => { app.canvas.ds.scale = 0.6; app.canvas.ds.offset = [500, 200]; "
                  "app.canvas.setDirty(true, true); }")
    page.wait_for_timeout(1000)
    page.screenshot(path=str(tmp_path / f"{page.renderer}-{path.stem}.png"))
    print(f"screenshot: {tmp_path}")
    check(page)
    page.evaluate("() => app.canvas.setGraph(app.rootGraph ?? app.graph)")
    assert not page.errors

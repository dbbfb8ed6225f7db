"""Concept Region Editor in a real page: with the mouse, by keyboard, in both of ComfyUI's renderers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EMPTY = {"last_node_id": 0, "last_link_id": 0, "nodes": [], "links": [], "groups": [], "config": {},
         "extra": {}, "version": 0.4}
ADD = """async empty => {
    await app.loadGraphData(empty);
    const node = LiteGraph.createNode('ConceptRegionsDraw');
    node.pos = [420, 110];
    app.graph.add(node);
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [0, 0];
    app.graph.setDirtyCanvas(true, true);
}"""
NODE = "app.graph._nodes.find(n => n.type === 'ConceptRegionsDraw')"
VALUE = f"{NODE}.widgets.find(w => w.name === 'drawing').value"


@pytest.fixture(scope="module")
def tab(open_page):
    """ComfyUI's page. It starts slowly, so one serves all tests."""
    return open_page(1500, 1050)


@pytest.fixture(params=["classic", "vue"])
def page(tab, request):
    """A new node, alone in the graph, in one of the renderers; nothing may go wrong on the page."""
    tab.render(request.param == "vue")
    tab.evaluate(ADD, EMPTY)
    tab.renderer = request.param
    ready(tab)
    tab.errors.clear()
    yield tab
    assert not tab.errors


def ready(page) -> None:
    page.locator(".ccr").wait_for()
    page.wait_for_timeout(600)


def drawing(page) -> list[dict]:
    """What the node's text says, as it would be saved."""
    saved = page.evaluate("app.graph.serialize()")
    (node,) = (node for node in saved["nodes"] if node["type"] == "ConceptRegionsDraw")
    assert len(node["widgets_values"]) == 3, node["widgets_values"]
    assert node["widgets_values"][0] == page.evaluate(VALUE)
    return json.loads(node["widgets_values"][0])


def seen(page) -> list[list[float]]:
    """The boxes as they lie on the page, in shares of the frame."""
    return page.evaluate("""() => {
        const frame = document.querySelector('.ccr-frame').getBoundingClientRect();
        return [...document.querySelectorAll('.ccr-box')].map(box => {
            const { left, top, right, bottom } = box.getBoundingClientRect();
            return [(left - frame.left) / frame.width, (top - frame.top) / frame.height,
                    (right - frame.left) / frame.width, (bottom - frame.top) / frame.height];
        });
    }""")


def drag(page, start: tuple[float, float], end: tuple[float, float], shift: bool = False) -> None:
    """From one place of the picture to another, in shares."""
    frame = page.locator(".ccr-frame").bounding_box()
    places = [(frame["x"] + x * frame["width"], frame["y"] + y * frame["height"]) for x, y in (start, end)]
    if shift:
        page.keyboard.down("Shift")
    page.mouse.move(*places[0])
    page.mouse.down()
    page.mouse.move(*places[1], steps=5)
    page.mouse.up()
    if shift:
        page.keyboard.up("Shift")
    page.wait_for_timeout(150)


def field(page, name: str):
    return page.locator(f'.ccr [data-field="{name}"]')


def fill(page, name: str, value: str) -> None:
    field(page, name).fill(value)
    field(page, name).press("Tab")


def near(box, expected, tolerance: float = 0.012) -> bool:
    return len(box) == 4 and all(abs(a - b) < tolerance for a, b in zip(box, expected, strict=True))


def shoot(page, folder: Path, name: str) -> None:
    file = folder / f"{page.renderer}-{name}.png"
    page.screenshot(path=str(file))
    print(f"screenshot: {file}")


def test_the_mouse_draws_moves_and_resizes(page, tmp_path):
    before = page.evaluate(VALUE)
    assert len(drawing(page)) == 2 and not page.get_by_role("textbox", name="drawing").count()
    shoot(page, tmp_path, "new")
    drag(page, (0.2, 0.03), (0.8, 0.13))
    third = drawing(page)[2]
    assert near(third["box"], [0.2, 0.03, 0.8, 0.13]) and third["prompt"] == ""
    assert before != page.evaluate(VALUE)
    drag(page, (0.25, 0.6), (0.3, 0.5))
    assert near(drawing(page)[0]["box"], [0.05, 0.05, 0.55, 0.9]), drawing(page)
    drag(page, (0.55, 0.9), (0.45, 0.8))  # the lower right corner of the selected one
    assert near(drawing(page)[0]["box"], [0.05, 0.05, 0.45, 0.8])
    drag(page, (0.55, 0.4), (0.75, 0.6), shift=True)  # inside the right one
    fourth = drawing(page)[3]["box"]
    assert near(fourth, [0.55, 0.4, 0.75, 0.6])
    drag(page, (0.65, 0.5), (0.65, 0.5))  # a click changes nothing, and takes the smaller of two
    assert drawing(page)[3]["box"] == fourth
    assert page.locator(".ccr-box").nth(3).get_attribute("aria-pressed") == "true"
    assert all(near(box, item["box"], 0.02) for box, item in zip(seen(page), drawing(page), strict=True))
    shoot(page, tmp_path, "drawn")


def test_fields_change_the_selected_region(page, tmp_path):
    page.locator(".ccr-box").nth(1).focus()
    assert field(page, "prompt").input_value() == "a photo of a cat in a meadow"
    field(page, "prompt").fill("a <img src=x onerror=alert(1)> dog")
    assert drawing(page)[1]["prompt"] == "a <img src=x onerror=alert(1)> dog"  # at every letter
    assert not page.locator(".ccr img").count()
    for name, value in {"name": "Mimi", "negative": "blue", "strength": "0.5", "start": "0.2", "end": "0.1",
                        "feather": "9"}.items():
        fill(page, name, value)
    fill(page, "w", "60")
    fill(page, "n", "20.5")
    page.locator(".ccr-swatch").nth(4).click()
    field(page, "on").uncheck()
    found = drawing(page)[1]
    assert found == {"name": "Mimi", "prompt": "a <img src=x onerror=alert(1)> dog",
                     "box": [0.6, 0.205, 1, 1], "color": "#4cdbc3",
                     "negative": "blue", "strength": 0.5, "start": 0.2, "end": 0.2, "feather": 0.5,
                     "on": False}
    fill(page, "e", "10")  # left of its left edge: as far as it goes
    assert drawing(page)[1]["box"] == [0.6, 0.205, 0.62, 1] and field(page, "e").input_value() == "62"
    fill(page, "e", "")
    assert drawing(page)[1]["box"] == [0.6, 0.205, 0.62, 1] and field(page, "e").input_value() == "62"
    shoot(page, tmp_path, "fields")


def test_the_keyboard_does_it_all(page):
    page.locator(".ccr").get_by_role("button", name="Add").click()
    page.keyboard.type("a red ball")  # the prompt has the keyboard; r would refresh the node list
    assert drawing(page)[2]["prompt"] == "a red ball"
    page.locator(".ccr-box").nth(2).focus()
    left, top, right, bottom = drawing(page)[2]["box"]
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Shift+ArrowRight", "Shift+ArrowUp"):
        page.keyboard.press(key)
    assert near(drawing(page)[2]["box"], [left + 0.02, top + 0.01, right + 0.03, bottom], 1e-6)
    page.locator(".ccr").get_by_role("button", name="Raise").click()
    assert [item.get("name") for item in drawing(page)] == ["left", None, "right"]
    page.locator(".ccr-box").nth(1).focus()
    page.keyboard.press("Delete")
    page.locator(".ccr-box").nth(0).focus()
    page.keyboard.press("Delete")
    assert [item["name"] for item in drawing(page)] == ["right"]
    page.keyboard.press("Delete")
    page.keyboard.press("Delete")
    assert drawing(page) == [] and page.evaluate(f"!!{NODE}")
    assert page.locator(".ccr-hint").is_visible()
    drag(page, (0.1, 0.1), (0.9, 0.9))
    assert near(drawing(page)[0]["box"], [0.1, 0.1, 0.9, 0.9])


def test_what_is_drawn_lasts(page):
    drag(page, (0.2, 0.03), (0.8, 0.13))
    fill(page, "prompt", "the sky")
    before, boxes = drawing(page), seen(page)
    saved = page.evaluate("app.graph.serialize()")
    page.evaluate("empty => app.loadGraphData(empty)", EMPTY)
    page.evaluate("saved => app.loadGraphData(saved)", saved)
    ready(page)
    assert drawing(page) == before and all(near(a, b) for a, b in zip(seen(page), boxes, strict=True))
    page.evaluate(f"() => app.canvas.selectNodes([{NODE}])")
    page.evaluate("() => { app.canvas.copyToClipboard(); app.canvas.pasteFromClipboard(); }")
    values = page.evaluate("app.graph._nodes.map(node => node.widgets.find(w => w.name === 'drawing').value)")
    assert len(values) == 2 and values[0] == values[1] and json.loads(values[1]) == before


def test_undo_takes_back_one_step(page):
    page.wait_for_timeout(300)
    page.evaluate("app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState()")
    before = drawing(page)
    drag(page, (0.25, 0.6), (0.3, 0.5))
    moved = drawing(page)
    assert moved != before
    page.keyboard.press("Control+z")
    page.wait_for_timeout(800)
    ready(page)
    assert drawing(page) == before
    assert len(seen(page)) == 2 and near(seen(page)[0], before[0]["box"], 0.02)


def test_it_works_inside_a_subgraph(page, tmp_path):
    before = drawing(page)
    page.evaluate(f"""() => {{
        const made = app.graph.convertToSubgraph(new Set([{NODE}]));
        app.canvas.setGraph(made.subgraph);
    }}""")
    ready(page)
    page.evaluate("() => { app.canvas.ds.offset = [0, 0]; app.graph.setDirtyCanvas(true, true); }")
    page.wait_for_timeout(500)
    inside = VALUE.replace("app.graph", "app.canvas.graph")
    assert json.loads(page.evaluate(inside)) == before and len(seen(page)) == 2
    drag(page, (0.2, 0.03), (0.8, 0.13))
    after = json.loads(page.evaluate(inside))
    assert len(after) == 3
    shoot(page, tmp_path, "subgraph")
    graph = page.evaluate("app.graphToPrompt().then(found => found.output)")
    assert [json.loads(node["inputs"]["drawing"]) for node in graph.values()] == [after]
    saved = page.evaluate("app.rootGraph.serialize()")
    page.evaluate("empty => app.loadGraphData(empty)", EMPTY)
    page.evaluate("saved => app.loadGraphData(saved)", saved)
    graph = page.evaluate("app.graphToPrompt().then(found => found.output)")
    assert [json.loads(node["inputs"]["drawing"]) for node in graph.values()] == [after]


def test_the_text_may_change_by_other_means(page):
    page.evaluate(f"""() => {{
        const widget = {NODE}.widgets.find(w => w.name === 'drawing');
        widget.value = '[{{"prompt": "x", "box": [0.25, 0.25, 0.75, 0.5]}}]';
    }}""")
    assert len(seen(page)) == 1 and near(seen(page)[0], [0.25, 0.25, 0.75, 0.5], 0.02)
    frame = page.locator(".ccr-frame").bounding_box()
    assert abs(frame["width"] / frame["height"] - 1) < 0.02
    page.evaluate(f"""() => {{
        const widget = {NODE}.widgets.find(w => w.name === 'width');
        widget.value = 1024;
        widget.callback(1024);
    }}""")
    frame = page.locator(".ccr-frame").bounding_box()
    assert abs(frame["width"] / frame["height"] - 2) < 0.05


def test_the_page_s_panel_does_not_make_the_editor_smaller(page):
    """The panel of a selected node writes the width of its own inputs into the widgets that it shows."""
    before = page.locator(".ccr-frame").bounding_box()
    page.evaluate(f"{NODE}.widgets.find(w => w.name === 'editor').width = 200")
    page.evaluate("app.graph.setDirtyCanvas(true, true)")
    page.wait_for_timeout(900)
    after = page.locator(".ccr-frame").bounding_box()
    assert after["width"] == pytest.approx(before["width"], rel=0.02)


def test_a_text_on_a_wire_is_not_drawn_on(page):
    page.evaluate(f"""() => {{
        const source = LiteGraph.createNode('PrimitiveStringMultiline');
        app.graph.add(source);
        const slot = {NODE}.inputs.findIndex(input => input.name === 'drawing');
        source.connect(0, {NODE}, slot);
    }}""")
    page.locator(".ccr-message").wait_for()
    assert "connection" in page.locator(".ccr-message").inner_text()
    assert not page.locator(".ccr textarea").last.is_visible()
    page.evaluate(f"""() => {{
        const node = {NODE};
        node.disconnectInput(node.inputs.findIndex(input => input.name === 'drawing'));
    }}""")
    page.locator(".ccr-frame").wait_for()
    assert len(seen(page)) == 2


def test_a_broken_text_is_told_and_kept(page, tmp_path):
    broken = '[{"prompt": "x", "box": [0.25, 0.25, 2, 0.5]}]'
    saved = page.evaluate("app.graph.serialize()")
    saved["nodes"][0]["widgets_values"][0] = broken
    page.evaluate("saved => app.loadGraphData(saved)", saved)
    page.locator(".ccr-message").wait_for()
    page.wait_for_timeout(600)
    assert "the box of region 1 is" in page.locator(".ccr-message").inner_text()
    assert not page.locator(".ccr-frame").is_visible()
    assert page.evaluate(VALUE) == broken
    assert page.evaluate("app.graph.serialize()")["nodes"][0]["widgets_values"][0] == broken
    shoot(page, tmp_path, "broken")
    field(page, "text").fill(broken.replace("2, 0.5", "1, 0.5"))
    assert not page.locator(".ccr-message").is_visible()
    page.locator(".ccr").get_by_role("button", name="Draw", exact=True).click()
    assert near(seen(page)[0], [0.25, 0.25, 1, 0.5], 0.02) and drawing(page)[0]["box"] == [0.25, 0.25, 1, 0.5]
    page.locator(".ccr").get_by_role("button", name="JSON").click()
    field(page, "text").fill("{")
    page.locator(".ccr").get_by_role("button", name="Start with no regions").click()
    assert drawing(page) == [] and page.locator(".ccr-frame").is_visible()


# Luminance of a field's text and background by WCAG 2.1, where a ratio of 4.5 is readable
SHADES = """() => {
    const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
    const linear = level => level <= 0.03928 ? level / 12.92 : ((level + 0.055) / 1.055) ** 2.4;
    const luminance = colour => {
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        const levels = [...canvas.getImageData(0, 0, 1, 1).data].map(level => linear(level / 255));
        return 0.2126 * levels[0] + 0.7152 * levels[1] + 0.0722 * levels[2];
    };
    return ['.ccr [data-field="prompt"]', '.ccr-button'].map(place => {
        const style = getComputedStyle(document.querySelector(place));
        return [luminance(style.color), luminance(style.backgroundColor)];
    });
}"""


def test_a_light_theme(page, tmp_path):
    """Fields and buttons follow the page's theme, and their text stays readable on them."""
    backgrounds = {}
    for theme in ("light", "dark"):
        page.evaluate("theme => app.extensionManager.setting.set('Comfy.ColorPalette', theme)", theme)
        page.wait_for_timeout(800)
        shoot(page, tmp_path, theme)
        shades = page.evaluate(SHADES)
        assert all((max(pair) + 0.05) / (min(pair) + 0.05) >= 4.5 for pair in shades), (theme, shades)
        backgrounds[theme] = [background for _, background in shades]
    assert min(backgrounds["light"]) > 0.5 > 0.2 > max(backgrounds["dark"])


def test_the_server_gets_the_drawing(page, server):
    """With Show Concept Regions behind it, all the way to a picture."""
    drag(page, (0.2, 0.03), (0.8, 0.13))
    fill(page, "prompt", "the sky")
    page.evaluate(f"""() => {{
        const add = (type, x) => {{
            const node = LiteGraph.createNode(type);
            node.pos = [x, 60];
            app.graph.add(node);
            return node;
        }};
        const image = add('EmptyImage', 950), show = add('ConceptRegionsShow', 1200), drawn = {NODE};
        image.connect(0, show, 0);
        drawn.connect(0, show, 1);
    }}""")
    text, graph = page.evaluate(VALUE), page.evaluate("app.graphToPrompt().then(found => found.output)")
    inputs = next(node["inputs"] for node in graph.values() if node["class_type"] == "ConceptRegionsDraw")
    assert inputs == {"drawing": text, "width": 512, "height": 512}
    entry = server.run(graph)
    (images,) = (output["images"] for output in entry["outputs"].values())
    assert images[0]["type"] == "temp" and not images[1:]

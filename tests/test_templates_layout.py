"""How the workflows lie on the page, as far as their files tell. `tests/live/test_layout.py` has the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

GRAPHS = sorted((Path(__file__).resolve().parents[1] / "workflows").glob("*.json"))
TITLE = 30                              # height of the title above a node
CANVAS = {"dark": 22, "light": 212}     # grey of the page's canvas, measured in ComfyUI 0.33
FILL = 1 - (1 - 0.25) ** 2              # share of a group's colour behind its title: painted twice at 0.25
# A group has one colour for its title, its fill and both themes. No colour reaches more than 2.14 in both.
LEAST_CONTRAST = 2.1
GROWS = {"ConceptLearner": 356}         # by the picture that a run shows on it


@pytest.fixture(params=GRAPHS, ids=lambda path: path.stem)
def graph(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def luminance(colour: list[float]) -> float:
    """Relative luminance as WCAG defines it."""
    shares = [value / 255 for value in colour]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def title_contrast(colour: str, canvas: int) -> float:
    """Of a group's title to what is behind it."""
    title = [int(colour[i:i + 2], 16) for i in (1, 3, 5)]
    behind = [FILL * value + (1 - FILL) * canvas for value in title]
    dark, light = sorted((luminance(title), luminance(behind)))
    return (light + 0.05) / (dark + 0.05)


def inside(graph: dict, group: dict) -> list[dict]:
    left, top, width, height = group["bounding"]
    return [node for node in graph["nodes"]
            if left <= node["pos"][0] < left + width and top <= node["pos"][1] < top + height]


def test_contrast_is_that_of_wcag():
    assert luminance([255, 255, 255]) == pytest.approx(1) and luminance([0, 0, 0]) == 0
    assert luminance([119, 119, 119]) == pytest.approx(0.1845, abs=1e-3)


def test_titles_of_groups_can_be_read_in_both_themes(graph):
    weak = {(group["title"], theme): contrast for group in graph["groups"] for theme, canvas in CANVAS.items()
            if (contrast := title_contrast(group["color"], canvas)) < LEAST_CONTRAST}
    assert not weak


def test_no_node_covers_the_title_of_its_group(graph):
    """Nodes of this pack have a badge above their title."""
    for group in graph["groups"]:
        gap = min(node["pos"][1] - TITLE for node in inside(graph, group)) - group["bounding"][1]
        assert gap >= 40, group["title"]


def test_groups_end_near_their_last_node(graph):
    """The page fits the nodes into the window, not the groups: what hangs over is cut off."""
    lowest = max(node["pos"][1] + node["size"][1] for node in graph["nodes"])
    for group in graph["groups"]:
        bottom = group["bounding"][1] + group["bounding"][3]
        end = max(node["pos"][1] + node["size"][1] + GROWS.get(node["type"], 0)
                  for node in inside(graph, group))
        assert 0 <= bottom - end <= 80 and bottom - lowest <= 80, group["title"]


def test_the_note_comes_first_and_has_a_title(graph):
    notes = [node for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    assert [note["title"] for note in notes] == ["About this workflow"]
    left, top = (min(node["pos"][i] for node in graph["nodes"]) for i in (0, 1))
    assert notes[0]["pos"] == [left, top]

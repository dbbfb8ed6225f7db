"""Help pages of nodes name the options of inputs, and give the default as 'Usual'."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .node_schemas import OF_THE_MACHINE

PAGES = Path(__file__).resolve().parents[2] / "nodes" / "web" / "docs"
NAMES = r"((?:`[^`\n]+`(?:,? \(?id `[^`\n]+`\)?)?(?:, )?)+): "
# options that another page lists, which the text names; and names of optimisers that need no words
ELSEWHERE = {("ConceptRegionsApply", "overlap"), ("ConceptDemoPhotos", "base"),
             ("ConceptTrainingSettings", "optimizer")}
# two inputs of one line, and defaults that follow the base or ComfyUI
OTHER_WORDS = {
    ("ConceptEvaluate", "prompts"): "a photo of {}, and a photo of {} in a forest",
    **{("ConceptRegion", edge): "0, 0, 0.5 and 1" for edge in ("left", "top", "right", "bottom")},
    ("ConceptLearner", "preset"): "person or animal",
}


def listed_inputs(page: str) -> dict[str, str]:
    """Id or name of an input -> its text, from the lists of inputs."""
    (section,) = re.findall(r"^## Inputs?\n(.+?)^## ", page, re.M | re.S)
    texts: dict[str, str] = {}
    for item in re.findall(r"^\* (.+?)(?=^\* |\n\n)", section, re.M | re.S):
        match = re.match(NAMES, item)
        for name in re.findall(r"`([^`]+)`", match[1] if match else ""):
            texts.setdefault(name, " ".join(item.split()))
    return texts


def as_text(default) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, str):
        return default or "empty"
    return f"{default:g}"


@pytest.fixture(scope="module")
def classes(pack):
    return [cls for name, cls in vars(pack).items() if name != "folder"]


def test_every_option_is_named(classes):
    for cls in classes:
        schema = cls.define_schema()
        page = " ".join((PAGES / f"{schema.node_id}.md").read_text(encoding="utf-8").split())
        for entry in schema.inputs:
            place = schema.node_id, entry.id
            if place in OF_THE_MACHINE | ELSEWHERE or place == ("ConceptFolderLearner", "folder"):
                continue
            options = [] if entry.id == "method" else entry.as_dict().get("options") or []
            lacking = [option for option in map(str, options) if option not in page]
            assert not lacking, f"{place}: {lacking}"


def test_usual_is_the_default(classes):
    """People read it as the value of a new node."""
    compared = 0
    for cls in classes:
        schema = cls.define_schema()
        texts = listed_inputs((PAGES / f"{schema.node_id}.md").read_text(encoding="utf-8"))
        for entry in schema.inputs:
            usual = texts[entry.id].partition("Usual: ")[2]
            if "default" not in entry.as_dict() or not usual:
                continue
            expected = OTHER_WORDS.get((schema.node_id, entry.id), as_text(entry.as_dict()["default"]))
            compared += 1
            assert re.match(rf"{re.escape(expected)}(?![\w.]\w)", usual), (schema.node_id, entry.id, usual)
    assert compared > 100

"""Saved graphs outlive a version: ids, types, order, defaults and options of every node stay what they were.

`tests/fixtures/before/nodes.json` was written by `node_schemas.schemas` from the code of before the rooms
were moved, inside ComfyUI 0.33.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BEFORE = json.loads((Path(__file__).parents[1] / "fixtures" / "before"
                     / "nodes.json").read_text(encoding="utf-8"))
# Defaults of new nodes only: saved graphs store the value of every input that is not optional.
NEW_DEFAULTS = {("ConceptLearner", "method"): "slots"} | dict.fromkeys([
    ("ConceptLearner", "name"), ("ConceptLearner", "class_noun"), ("ConceptImport", "name"),
    ("ConceptImport", "class_noun"), ("ConceptBankEdit", "concept"), ("ConceptExport", "concept"),
    ("ConceptReferencePhotos", "concept"), ("ElasticWeightAggregate", "prompt")], "") | {
    ("ConceptRegion", "prompt"): "a photo of a dog in a meadow",
    ("ConceptRegionsDraw", "drawing"): """[
{"name": "left", "prompt": "a photo of a dog in a meadow", "box": [0, 0.15, 0.5, 1]},
{"name": "right", "prompt": "a photo of a cat in a meadow", "box": [0.5, 0.15, 1, 1]}
]"""}
# A saved graph has a link there, which a node without the need for one accepts.
NOW_OPTIONAL = {("ConceptEvaluate", "clip_vision")}


@pytest.fixture(scope="module")
def now(script, pack):
    schemas = script(Path(__file__).with_name("node_schemas.py")).schemas
    return schemas(cls for name, cls in vars(pack).items() if name != "folder")


def without_new_options(entry: dict, before: dict) -> dict:
    """An input without the options that it has gained since: a saved graph names none of them."""
    if "options" not in before or "options" not in entry:
        return entry
    return {**entry, "options": [option for option in entry["options"] if option in before["options"]]}


def as_now(node: str, entry: dict) -> dict:
    """An input of before with the changes that saved graphs do not notice."""
    if (node, entry["id"]) in NOW_OPTIONAL:
        entry = {**entry, "optional": True}
    default = NEW_DEFAULTS.get((node, entry["id"]))
    assert default is None or not entry["optional"]
    return entry if default is None else {**entry, "default": default}


def without_names(outputs: list[dict]) -> list[dict]:
    """Links of saved graphs hold an output's position and type; the page shows the name of today."""
    return [{key: value for key, value in entry.items() if key != "name"} for entry in outputs]


@pytest.mark.parametrize("node", BEFORE)
def test_a_node_is_what_saved_graphs_know(now, node):
    before, after = BEFORE[node], now[node]
    count = len(before["inputs"])
    assert [without_new_options(new, old) for new, old in
            zip(after["inputs"], before["inputs"], strict=False)] == \
        [as_now(node, entry) for entry in before["inputs"]]
    # what is new comes last and may be missing
    assert all(entry["optional"] for entry in after["inputs"][count:])
    assert without_names(after["outputs"][:len(before["outputs"])]) == without_names(before["outputs"])
    kept = set(before) - {"inputs", "outputs", "category"}      # a category is a place in the menu
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}

"""What people see of the nodes: a menu with few nodes on top, names that say what they do, and texts in new
nodes that fit any bank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP = "continual concepts"
EVERYDAY = {"ConceptPhotosLoad", "ConceptLearner", "ConceptBankSave", "ConceptBankLoad",
            "ElasticWeightAggregate", "ConceptRegionsDraw"}
BELOW = {"regions", "banks", "evaluation", "advanced"}
RENAMED = {"ElasticWeightAggregate": "Elastic Weight Aggregate", "ConceptRegionsDraw": "Draw Concept Regions",
           "ConceptNeuronSelect": "Concept Neuron Select", "ConceptEvaluate": "Concept Evaluate"}


@pytest.fixture(scope="module")
def nodes(pack) -> dict:
    """Node id -> schema."""
    classes = [cls for name, cls in vars(pack).items() if name != "folder"]
    return {schema.node_id: schema for schema in (cls.define_schema() for cls in classes)}


def test_six_nodes_of_every_day_are_on_top_of_the_menu(nodes):
    assert {name for name, node in nodes.items() if node.category == TOP} == EVERYDAY
    assert set(list(nodes)[:len(EVERYDAY)]) == EVERYDAY      # the menu keeps the order of the list
    below = {node.category for name, node in nodes.items() if name not in EVERYDAY}
    assert below == {f"{TOP}/{name}" for name in BELOW}


def test_a_renamed_node_is_found_by_its_earlier_name(nodes):
    for name, earlier in RENAMED.items():
        assert nodes[name].display_name != earlier
        aliases = getattr(nodes[name], "search_aliases", None)      # ComfyUI 0.8 and older have none
        assert aliases is None or earlier in aliases


def test_the_name_of_the_extension_finds_each_node(nodes):
    """The page looks for words in display names and aliases, not in categories."""
    for node in nodes.values():
        aliases = getattr(node, "search_aliases", None)      # ComfyUI 0.8 and older have none
        assert aliases is None or TOP in aliases


def test_no_text_shows_an_earlier_name_of_a_node():
    """Only the changes and the list of search aliases name them."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "nodes").rglob("*.md"),
             *(ROOT / "workflows").glob("*.json"), *(ROOT / "subgraphs").glob("*.json"),
             *(ROOT / "core").rglob("*.py"), *(ROOT / "locales").rglob("*.json")]
    assert len(files) > 100
    found = [f"{file.name}: {name}" for file in files for text in [file.read_text(encoding="utf-8")]
             for name in RENAMED.values() if name in text]
    assert not found


def test_texts_of_new_nodes_name_no_concept(nodes):
    defaults = [(name, entry.id, entry.default) for name, node in nodes.items() for entry in node.inputs
                if isinstance(getattr(entry, "default", None), str)]
    assert len(defaults) > 30
    assert not [entry for entry in defaults if "<" in entry[2] or entry[2] in ("rex", "mimi")]


def test_listed_options_may_have_a_name_that_says_what_they_do(nodes):
    entry = next(one for one in nodes["ElasticWeightAggregate"].inputs if one.id == "mode")
    labels = entry.as_dict()["option_labels"]
    assert set(labels) <= set(entry.options)
    assert all(option in label for option, label in labels.items())
    json.dumps(labels)

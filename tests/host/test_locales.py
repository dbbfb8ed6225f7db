"""What people read of the nodes: every input is explained, and every language tells of all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("en", "zh", "ja", "de")


@pytest.fixture(scope="module")
def maker(script):
    return script(Path(__file__).with_name("make_locales.py"))


@pytest.fixture(scope="module")
def english(maker, pack):
    return maker.definitions(cls for name, cls in vars(pack).items() if name != "folder")


def keys(value, path="") -> set[str]:
    """Every place in it that holds a text."""
    if not isinstance(value, dict):
        return {path}
    return {place for key, one in value.items() for place in keys(one, f"{path}/{key}")}


def test_the_english_file_is_what_the_nodes_say(maker, english):
    """Else: python tests/host/make_locales.py COMFYUI_FOLDER"""
    assert maker.FILE.read_text(encoding="utf-8") == maker.text_of(english)


def test_every_node_and_input_is_explained(english):
    for node, one in english.items():
        assert one["description"].endswith("."), node
        for name, part in one["inputs"].items():
            assert len(part.get("tooltip", "")) > 8, f"{node}: {name}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_tells_of_everything(english, language):
    found = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert keys(found) == keys(english)
    assert all(isinstance(one["display_name"], str) and one["display_name"].strip() for one in found.values())


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_translations_are_translated(english, language):
    """Most tooltips differ from the English ones, and what is typed or clicked stays what it is."""
    found = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    same, count = 0, 0
    for node, one in english.items():
        for name, part in one["inputs"].items():
            there = found[node]["inputs"][name]["tooltip"]
            same, count = same + (there == part["tooltip"]), count + 1
            for literal in ("<rex>", "models/concept_banks", "models/loras", "output/concept_banks", "CIDM",
                            "LoRA"):
                assert literal in there or literal not in part["tooltip"], f"{language}: {node}, {name}"
    assert same < 0.05 * count

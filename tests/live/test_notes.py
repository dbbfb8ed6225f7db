"""The notes in the workflows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

GRAPHS = sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))
NEEDED = {"CheckpointLoaderSimple": ("models/checkpoints",), "CLIPVisionLoader": ("models/clip_vision",),
          "ConceptFolderLearner": ("input/cast",), "ConceptPhotosLoad": ("photos",),
          "ConceptBankLoad": ("bank",), "LoadImage": ("photo in *input*",),
          "ConceptImport": ("models/loras",)}


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_notes_say_what_a_workflow_needs(path):
    """A file that is missing stops the run with the name of a node; the note says where files belong."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    needed = [text for node in graph["nodes"] for text in NEEDED.get(node["type"], ())]
    notes = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    told = re.findall(r"^\*\*Needs\*\* (.+)$", "\n".join(notes), re.M)
    assert len(told) == bool(needed)
    missing = [text for text in needed if text not in told[0]]
    assert not missing

"""Saved workflows and banks of before give the same pictures.

`tests/fixtures/before` holds two graphs in API format, the banks that they load, and the pictures that the
code of before drew from them inside ComfyUI 0.33.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

BEFORE = Path(__file__).parents[1] / "fixtures" / "before"
MEAN, MOST = 0.05, 8      # grey levels of 0 to 255, see tests/test_before.py

pytestmark = pytest.mark.usefixtures("as_in_comfyui")


def run(graph: dict, classes: dict, wanted: str):
    """Outputs of the node `wanted` of a graph in API format. classes: by name, ours and ComfyUI's."""
    done: dict[str, tuple] = {}

    def outputs(key: str) -> tuple:
        if key not in done:
            node = classes[graph[key]["class_type"]]
            call = node.execute if hasattr(node, "define_schema") else getattr(node(), node.FUNCTION)
            linked = {name: outputs(value[0])[value[1]] if isinstance(value, list) else value
                      for name, value in graph[key]["inputs"].items()}
            found = call(**linked)
            done[key] = getattr(found, "args", found)
        return done[key]

    return outputs(wanted)


@pytest.fixture
def banks(pack):
    """The banks of before, where Concept Bank Load finds them."""
    import folder_paths

    folder = Path(folder_paths.models_dir) / "concept_banks"
    folder.mkdir(parents=True, exist_ok=True)
    copies = [Path(shutil.copy(BEFORE / f"{name}.safetensors", folder)) for name in ("bound", "cidm")]
    yield
    for copy in copies:
        copy.unlink()


@pytest.mark.parametrize("name", ["regions", "ksampler"])
def test_a_saved_workflow_gives_the_same_picture(pack, studio, banks, name):
    graph = json.loads((BEFORE / f"{name}.json").read_text(encoding="utf-8"))
    images = run(graph, {**studio.stock.NODE_CLASS_MAPPINGS, **vars(pack)}, "decode")[0]
    drawn = (images.clamp(0, 1) * 255).round()
    difference = (drawn - load_file(BEFORE / "pictures.safetensors")[f"workflow/{name}"].float()).abs()
    assert difference.mean() < MEAN and difference.max() <= MOST

"""Takes the thumbnails of the workflows: photos above, what the workflow gives below. It prints their folder.

Every workflow runs as it ships, which takes half an hour or more on a CPU. Copy the files to `workflows`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from continual_concepts.core.demo.bases import EMBEDDED, picture_size
from continual_concepts.core.demo.scenes import CONCEPTS

pytestmark = pytest.mark.slow

API_GRAPHS = sorted((Path(__file__).resolve().parents[2] / "workflows" / "api").glob("*.json"))
SIDE, GAP, PAPER = 504, 8, (22, 22, 22)


def photos_of(graph: dict) -> list[Image.Image]:
    """One photo of each concept that is learned; two of a concept that is alone."""
    given = {node["inputs"]["concept"]: node["inputs"] for node in graph.values()
             if node["class_type"] == "ConceptDemoPhotos"}
    if any(node["class_type"] == "ConceptFolderLearner" for node in graph.values()):
        given = {name: {"seed": 7, "base": EMBEDDED} for name in ("rex", "mimi")}      # as in conftest.py
    each = 2 if len(given) == 1 else 1
    return [Image.fromarray(picture) for name, inputs in list(given.items())[:2]
            for picture, _ in CONCEPTS[name].pictures(each, inputs["seed"], picture_size(inputs["base"]))]


def tiled(rows: list[list[Image.Image]]) -> Image.Image:
    """Rows of pictures on a square. Pixels stay sharp where pictures are enlarged by a whole number."""
    sheet = Image.new("RGB", (SIDE, SIDE), PAPER)
    height = (SIDE - GAP * (len(rows) + 1)) // len(rows)
    for i, row in enumerate(rows):
        width = (SIDE - GAP * (len(row) + 1)) // len(row)
        for j, picture in enumerate(row):
            fitted = ImageOps.contain(picture.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
            left = GAP + j * (width + GAP) + (width - fitted.width) // 2
            sheet.paste(fitted, (left, GAP + i * (height + GAP) + (height - fitted.height) // 2))
    return sheet


def thumbnail(graph: dict, drawn: list[Image.Image]) -> Image.Image:
    """drawn: the pictures that the workflow saved."""
    photos, wide = photos_of(graph), [picture for picture in drawn if picture.width > 1.5 * picture.height]
    if wide:      # a sheet, or a scene with regions
        return tiled([photos, wide[:1]])
    return tiled([photos, drawn[-2:]])


@pytest.mark.parametrize("path", API_GRAPHS, ids=lambda path: path.stem)
def test_a_thumbnail_of_each_workflow(server, tmp_path_factory, path):
    graph = json.loads(path.read_text(encoding="utf-8"))
    drawn = [Image.open(file) for file in server.pictures(server.run(graph, limit=7200))]
    picture = thumbnail(graph, drawn)
    folder = tmp_path_factory.getbasetemp() / "thumbnails"
    folder.mkdir(exist_ok=True)
    file = folder / f"{path.stem}.jpg"
    picture.save(file, quality=88)
    assert file.stat().st_size < 60_000 and np.asarray(picture).std() > 10
    print(f"thumbnail: {file}")

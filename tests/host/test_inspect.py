"""Inspect Concept Bank in a real ComfyUI: pictures, text and report; thumbnails through a CLIP_VISION."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.errors import ConceptError

pytestmark = pytest.mark.usefixtures("as_in_comfyui")


class Colours:
    """A CLIP_VISION that sees nothing but a coarse picture."""

    def encode_image(self, image, crop=True):
        assert image.ndim == 4 and image.shape[-1] == 3 and image.min() >= 0 and image.max() <= 1
        return {"image_embeds": torch.nn.functional.adaptive_avg_pool2d(image.movedim(-1, 1), 2).flatten(1)}


def thumbnail(shade: int, right: int = 0) -> bytes:
    image = Image.new("RGB", (48, 48), (shade, 40, 90))
    image.paste((right, 250, 0), (24, 0, 48, 48))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def alike(bank):
    """Two bound dogs with nearly the same thumbnail, and a third concept with another one."""
    made = ConceptBank(bank.layout)
    for i, (name, picture) in enumerate((("rex", thumbnail(200)), ("mimi", thumbnail(200, 3)),
                                         ("blueprint", thumbnail(20, 250)))):
        info = bank[name].info
        info = replace(info, method="bound", provenance=replace(info.provenance, images=(f"{i}",)))
        made = made.add(replace(bank[name], info=info, thumbnail=picture))
    return made


def test_the_id_and_the_places_of_inputs_and_outputs_stay(studio):
    schema = studio.pack.ConceptBankInspect.define_schema()
    assert [one.id for one in schema.inputs] == ["bank", "clip_vision"] and schema.inputs[1].optional
    assert [one.display_name for one in schema.outputs] == ["cards", "summary", "report (JSON)"]


def test_picture_text_and_report(studio, alike):
    result = studio.pack.ConceptBankInspect.execute(alike)
    picture, text, report = result.args
    assert picture.ndim == 4 and picture.shape[0] == 1 and picture.shape[-1] == 3 and picture.min() >= 0
    assert picture.max() <= 1
    *rows, base = text.splitlines()
    assert [line.split("  ")[0] for line in rows] == ["<rex>", "<mimi>", "<blueprint>"]
    assert base == f"made on {alike.layout.describe()}"
    assert "warning" not in text
    told = json.loads(report)
    assert [one["name"] for one in told["concepts"]] == alike.names
    assert set(told["likeness"]) == {"deltas", "words"}
    assert result.ui["text"] == (text,) and len(result.ui["images"]) == 1


def test_with_a_vision_model_thumbnails_are_compared_and_warnings_come_first(studio, alike):
    _, text, report = studio.pack.ConceptBankInspect.execute(alike, Colours()).args
    assert text.startswith("warning: <rex> and <mimi> collide: their thumbnails look alike")
    told = json.loads(report)
    assert told["collisions"][0]["kind"] == "covers"
    assert told["concepts"][0]["most_like"]["covers"]["name"] == "mimi"


def test_a_vision_model_that_gives_no_vectors_is_refused(studio, alike):
    class Broken:
        def encode_image(self, image, crop=True):
            return {"image_embeds": torch.full((1, 4), torch.nan)}

    with pytest.raises(ConceptError, match="choose another"):
        studio.pack.ConceptBankInspect.execute(alike, Broken())


def test_an_empty_bank(studio):
    picture, text, report = studio.pack.ConceptBankInspect.execute(None).args
    assert text == "the bank is empty" and json.loads(report)["concepts"] == [] and picture.ndim == 4


def test_pages_are_a_batch(studio, alike):
    many = ConceptBank(alike.layout)
    for i in range(70):
        many = many.add(replace(alike["rex"], thumbnail=b"").renamed(f"c{i}"))
    result = studio.pack.ConceptBankInspect.execute(many)
    assert result.args[0].shape[0] == len(result.ui["images"]) > 1

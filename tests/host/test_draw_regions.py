"""Concept Region Editor says the same as a chain of Concept Region; Show Concept Regions changes the pixels
of its lines alone."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch

from continual_concepts.core.errors import ConceptError
from continual_concepts.core.regional.regions import Region

pytestmark = pytest.mark.usefixtures("as_in_comfyui")
SETTINGS = {"strength": 0.5, "start": 0.25, "end": 0.75, "feather": 0.125, "negative": "bad"}
DRAWING = json.dumps(
    [
        {"prompt": "<rex> and a cat", "box": [0, 0.125, 0.5, 1], "name": "dog", "color": "#00ff00"},
        {"prompt": "left out", "box": [0, 0, 1, 1], "on": False},
        {"prompt": "a dog and <mimi>", "box": [0.5, 0, 1, 0.875], **SETTINGS},
    ]
)


def said(region) -> tuple:
    """What a sampler reads of a region."""
    return tuple(getattr(region, field.name) for field in fields(Region))


def draw(studio, text: str, regions=None) -> list:
    return studio.pack.ConceptRegionsDraw.execute(text, 512, 512, regions)[0]


def test_a_drawing_is_a_chain_of_regions(studio):
    chain = [
        studio.region("<rex> and a cat", left=0.0, top=0.125, right=0.5, bottom=1.0),
        studio.region("a dog and <mimi>", left=0.5, top=0.0, right=1.0, bottom=0.875, **SETTINGS),
    ]
    drawn = draw(studio, DRAWING)
    assert [said(region) for region in drawn] == [said(region) for region in chain]
    pictures = [studio.regional("a photo", regions, studio.bank, steps=2) for regions in (drawn, chain)]
    assert torch.equal(*pictures)


def test_regions_before_come_first(studio):
    before = [studio.region("a red ball", right=0.5)]
    found = draw(studio, DRAWING, before)
    assert found[0] is before[0] and len(found) == 3 and len(before) == 1
    assert draw(studio, "", before) == before and draw(studio, "[]") == []


def test_what_a_new_node_says_can_be_read(studio):
    schema = studio.pack.ConceptRegionsDraw.define_schema()
    default = next(given.default for given in schema.inputs if given.id == "drawing")
    left, right = draw(studio, default)
    assert "a dog" in left.prompt and "a cat" in right.prompt and left.box[3] == right.box[1]


@pytest.mark.parametrize("text", ["[", "{}", '[{"prompt": "a", "box": [0, 0, 2, 1]}]',
                                  '[{"prompt": "", "box": [0, 0, 1, 1]}]'])
def test_a_mistake_is_one_sentence_before_anything_runs(studio, text):
    with pytest.raises(ConceptError) as caught:
        draw(studio, text)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 400
    assert studio.pack.ConceptRegionsDraw.validate_inputs(drawing=text) == sentence


def test_a_good_drawing_and_one_on_a_wire_pass(studio):
    assert studio.pack.ConceptRegionsDraw.validate_inputs(drawing=DRAWING) is True
    assert studio.pack.ConceptRegionsDraw.validate_inputs(drawing=None) is True


def show(studio, image, regions=None):
    out = studio.pack.ConceptRegionsShow.execute(image, regions)
    preview = out.ui.as_dict()["images"]
    assert len(preview) == len(image)
    assert (studio.pack.folder / "temp" / preview[0]["subfolder"] / preview[0]["filename"]).is_file()
    return out[0]


@pytest.mark.parametrize("regions", [None, []])
def test_without_regions_nothing_changes(studio, regions):
    image = torch.rand(2, 40, 64, 3)
    assert torch.equal(show(studio, image, regions), image)


@pytest.mark.parametrize("channels", [3, 4])
def test_outlines_in_their_colours_and_nothing_else(studio, channels):
    image = torch.rand(2, 96, 128, channels)
    mask = torch.zeros(1, 24, 32)
    mask[:, 12:, 16:] = 1
    regions = [*draw(studio, DRAWING), studio.region("by mask", mask=mask, strength=0.0)]
    found = show(studio, image, regions)
    assert found.shape == image.shape and torch.isfinite(found).all()
    # The drawing's own colour at the left edge
    assert torch.equal(found[:, 50, 0, :3], torch.tensor([[0.0, 1.0, 0.0]] * 2))
    changed = (found != image).any(-1)
    assert torch.equal(changed[0], changed[1]) and 0.01 < changed.float().mean() < 0.4
    assert not changed[:, :12, :60].any()  # above the first box there is nothing to be drawn
    assert not changed[:, 64:80, 80:120].any()  # nor inside

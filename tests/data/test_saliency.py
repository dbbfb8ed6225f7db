"""Masks that are made without a model, and how photos get them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from continual_concepts.core.data import saliency
from continual_concepts.core.data.contact_sheet import contact_sheet
from continual_concepts.core.data.folder import read_folder


def photo(size=(240, 180), box=(70, 50, 150, 140), colour=(200, 60, 40), seed=0):
    """A coloured disc with a white hole before a noisy gradient, and the disc's place `[H, W]`."""
    rng = np.random.default_rng(seed)
    ground = np.linspace(70, 150, size[0])[None, :, None] + rng.normal(0, 6, (size[1], size[0], 3))
    picture, place = Image.fromarray(ground.clip(0, 255).astype(np.uint8)), Image.new("L", size)
    ImageDraw.Draw(picture).ellipse(box, colour)
    ImageDraw.Draw(place).ellipse(box, 255)
    middle = ((box[0] + box[2]) // 2, (box[1] + box[3]) // 2)
    hole = (middle[0] - 8, middle[1] - 8, middle[0] + 8, middle[1] + 8)
    ImageDraw.Draw(picture).ellipse(hole, (105, 105, 105))
    return picture, np.array(place) > 127


def levels(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def overlap(mask, place):
    found = mask[0].numpy() > 127
    return (found & place).sum() / (found | place).sum()


@pytest.mark.parametrize(("size", "box"), [
    ((240, 180), (70, 50, 150, 140)), ((180, 240), (20, 100, 130, 220)), ((1200, 900), (300, 300, 700, 700)),
])
def test_a_subject_is_found_whole_and_in_its_place(size, box):
    picture, place = photo(size, box)
    mask = saliency.subject_mask(levels(picture))
    assert mask.shape == (1, *place.shape) and mask.dtype == torch.uint8
    assert overlap(mask, place) > 0.85      # the hole belongs to the subject
    assert torch.equal(mask, saliency.subject_mask(levels(picture)))


@pytest.mark.parametrize("picture", [
    Image.new("RGB", (200, 150), (90, 90, 90)), Image.new("RGB", (3, 2), (1, 2, 3)),
    Image.new("RGB", (400, 5), (255, 255, 255)),
])
def test_a_photo_without_a_subject_has_no_mask(picture):
    assert saliency.subject_mask(levels(picture)) is None


def test_photos_without_a_mask_get_one_and_the_sheet_shows_it(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        photo(seed=seed)[0].save(tmp_path / f"{name}.png")
    Image.new("L", (240, 180), 255).save(tmp_path / "b-masklabel.png")
    Image.new("RGB", (240, 180), (9, 9, 9)).save(tmp_path / "flat.png")
    plain, found = read_folder(tmp_path), read_folder(tmp_path, find_subject=True)
    assert [picture.mask is None for picture in plain.pictures] == [True, False, True]
    masks = [picture.stored_mask() for picture in found.pictures]
    assert overlap(masks[0], photo()[1]) > 0.85 and masks[1].min() == 255 and masks[2] is None
    lines = found.report.lines()
    assert any("a.png" in line and "mask found in the photo" in line for line in lines)
    assert any("flat.png" in line and "no subject found, learned whole" in line for line in lines)
    assert not any(warning.kind == "mask" for warning in found.report.warnings)
    shown, whole = (np.asarray(contact_sheet(photos.report), dtype=float) for photos in (found, plain))
    assert shown.shape != whole.shape or np.abs(shown - whole).max() > 50

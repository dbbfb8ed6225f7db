"""Masks as people bring them: each is taken, or named with the reason."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from continual_concepts.core.data.folder import read_folder
from continual_concepts.core.data.pictures import weights
from continual_concepts.tests.practice.photo_files import photo, refusal, skipped

# A5


@pytest.mark.parametrize("name", ["a-masklabel.png", "a_mask.png", "a.mask.png", "A-mask.png"])
def test_a5_masks_beside_photos(tmp_path, name):
    photo(tmp_path / "a.jpg")
    Image.new("L", (48, 32), 255).save(tmp_path / name)
    photos = read_folder(tmp_path)
    assert len(photos.pictures) == 1 and photos.report.photos[0].mask_from == name


def test_a5_sibling_names_that_only_look_like_masks(tmp_path):
    """A photo of a mask is a photo; a mask label without its photo is none."""
    photo(tmp_path / "carnival_mask.jpg")
    Image.new("L", (48, 32), 255).save(tmp_path / "b-masklabel.png")
    photos = read_folder(tmp_path)
    assert [facts.name for facts in photos.report.photos] == ["carnival_mask.jpg"]
    assert "no photo has this name" in skipped(photos.report)["b-masklabel.png"]


def test_a5_sibling_masks_with_endings_in_a_folder_of_masks(tmp_path):
    photo(tmp_path / "a.jpg")
    (tmp_path / "masks").mkdir()
    Image.new("L", (48, 32), 255).save(tmp_path / "masks" / "a.jpg.png")
    Image.new("L", (48, 32), 255).save(tmp_path / "masks" / "z_mask.png")
    photos = read_folder(tmp_path)
    assert photos.report.photos[0].mask_from == "masks/a.jpg.png"
    assert "no photo" in skipped(photos.report)["masks/z_mask.png"]


# A6


def test_a6_masks_that_match_nothing(tmp_path):
    photo(tmp_path / "photos" / "a.jpg")
    (tmp_path / "m").mkdir()
    for _ in range(2):
        text = refusal(lambda: read_folder(tmp_path / "photos", masks=tmp_path / "m"))
        assert str(tmp_path / "photos") in text and str(tmp_path / "m") in text
        Image.new("L", (48, 32)).save(tmp_path / "m" / "b.png")


def test_a6_sibling_the_subfolder_masks_without_a_match_is_refused(tmp_path):
    photo(tmp_path / "a.jpg")
    (tmp_path / "masks").mkdir()
    assert len(read_folder(tmp_path).pictures) == 1      # an empty one asks for nothing
    Image.new("L", (48, 32)).save(tmp_path / "masks" / "b.png")
    assert "no mask in" in refusal(lambda: read_folder(tmp_path))


def test_a6_sibling_some_photos_without_masks_are_told(tmp_path):
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "b.jpg")
    Image.new("L", (48, 32), 255).save(tmp_path / "a_mask.png")
    assert "b.jpg has no mask" in " ".join(read_folder(tmp_path).report.lines())


# A7


def half(size, axis) -> Image.Image:
    """A mask whose left half, or upper half, is white."""
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]) if axis == "left" else (0, 0, size[0], size[1] // 2))
    return mask


@pytest.mark.parametrize(("mask", "note"), [(half((32, 48), "left"), ""),
                                            (half((48, 32), "top"), "mask turned like the photo")])
def test_a7_masks_of_turned_photos(tmp_path, mask, note):
    """A photo turned to the right by EXIF: its upper half as stored is the right half as seen."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(tmp_path / "a.jpg", exif=exif)
    mask.save(tmp_path / "a_mask.png")
    photos = read_folder(tmp_path)
    white = weights(photos.pictures[0].stored_mask())[0]
    assert photos.pictures[0].size == (48, 32) and photos.report.photos[0].note == note
    assert white[:, :16].mean() == (0 if note else 1) and white[:, 16:].mean() == (1 if note else 0)


def test_a7_masks_of_another_shape_are_refused(tmp_path):
    photo(tmp_path / "a.jpg")
    Image.new("L", (40, 40), 255).save(tmp_path / "a_mask.png")
    text = refusal(lambda: read_folder(tmp_path))
    assert "a_mask.png" in text and "40x40" in text and "48x32" in text


def test_a7_sibling_a_smaller_mask_of_the_same_shape_is_told(tmp_path):
    photo(tmp_path / "a.jpg")
    Image.new("L", (24, 16), 255).save(tmp_path / "a_mask.png")
    assert read_folder(tmp_path).report.photos[0].note == "mask resized from 24x16"


# A8


def test_a8_the_subject_in_alpha_and_16_bit(tmp_path):
    cutout = np.zeros((32, 48, 4), np.uint8)
    cutout[:, 24:] = 255
    sixteen = np.full((32, 48), 32768, np.uint16)
    for name, array in (("a", cutout), ("b", sixteen)):
        photo(tmp_path / f"{name}.jpg")
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(array).save(tmp_path / "masks" / f"{name}.png")
    alpha, grey = (weights(p.stored_mask())[0] for p in read_folder(tmp_path).pictures)
    assert alpha[:, :24].max() == 0 and alpha[:, 24:].min() == 1
    assert grey.mean() == pytest.approx(0.5, abs=0.01)


def test_a8_sibling_opaque_alpha_and_palettes(tmp_path):
    opaque = Image.merge("RGBA", [*[half((48, 32), "left")] * 3, Image.new("L", (48, 32), 255)])
    for name, mask in (("a", opaque), ("b", half((48, 32), "left").convert("P"))):
        photo(tmp_path / f"{name}.jpg")
        mask.save(tmp_path / f"{name}-mask.png")
    for picture in read_folder(tmp_path).pictures:
        mask = weights(picture.stored_mask())[0]
        assert mask[:, :24].min() == 1 and mask[:, 24:].max() == 0

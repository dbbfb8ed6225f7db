"""The report on photos and its contact sheet."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from continual_concepts.core.data.contact_sheet import COLUMNS, FEW, MOST, SIDE, contact_sheet
from continual_concepts.core.data.pictures import Picture, pair_pictures
from continual_concepts.core.data.quality import ALIKE, BLURRED, alike, measure
from continual_concepts.core.data.report import Report, Skipped, listed, report_of
from continual_concepts.core.images import ALARM


def blocks(seed: int, side: int = 128, resample=Image.Resampling.NEAREST) -> torch.Tensor:
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    picture = np.asarray(Image.fromarray(small).resize((side, side), resample))
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)


def test_sharpness_tells_blurred_from_sharp():
    assert measure(blocks(0)).sharpness > 2 * BLURRED
    assert measure(blocks(0, 512, Image.Resampling.BICUBIC)).sharpness < BLURRED
    assert measure(torch.zeros(3, 32, 32)).sharpness is None


def test_a_photo_blurred_for_512_pixels_may_be_sharp_for_64():
    picture = blocks(0, 512, Image.Resampling.BICUBIC)
    assert measure(picture, 512).sharpness < BLURRED < measure(picture, 32).sharpness


def test_eight_bits_and_floats_are_measured_alike():
    levels = blocks(0)
    one, other = measure(levels), measure(levels.float() / 127.5 - 1)
    assert one.sharpness == pytest.approx(other.sharpness, abs=1e-3)
    assert float(one.pattern @ other.pattern) > 0.999


def test_copies_are_alike_and_other_photos_are_not():
    first, copy, other = blocks(0), blocks(0, 100), blocks(1)
    assert alike([measure(picture) for picture in (first, other, copy)]) == [[0, 2]]
    assert float(measure(first).pattern @ measure(other).pattern) < ALIKE


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 3), (7, 2)])
def test_any_shape_is_measured(size):
    quality = measure(torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    assert max(quality.thumbnail.size) <= SIDE and torch.isfinite(quality.pattern).all()


def test_lists_of_names_end():
    assert listed(["a"]) == "a" and listed(["a", "b", "c"]) == "a, b and c"
    assert listed(map(str, range(9))) == "0, 1, 2, 3, 4 and 4 more"


def sheet(count: int, **changes) -> Image.Image:
    photos = report_of([Picture(blocks(i), name=f"{i}.png", digest=str(i)) for i in range(count)]).photos
    return contact_sheet(Report(photos, **changes).checked())


def pixels(image: Image.Image) -> set[tuple[int, int, int]]:
    return set(map(tuple, np.asarray(image).reshape(-1, 3).tolist()))


def test_the_sheet_shows_every_photo():
    small, wide = sheet(1), sheet(FEW + 1)
    assert wide.height > 2 * SIDE and wide.width > COLUMNS * SIDE
    assert small.height < wide.height and sheet(MOST + 20).height == sheet(MOST).height


def test_the_sheet_marks_what_is_wrong():
    assert ALARM not in pixels(sheet(3))
    assert ALARM in pixels(sheet(1))      # one photo is too few
    assert sheet(3, skipped=(Skipped("x.heic", "needs a package"),)).height > sheet(3).height


def test_the_sheet_of_no_photo():
    assert contact_sheet(Report(())).width > SIDE


def test_a_mask_is_seen_on_the_sheet():
    mask = torch.zeros(1, 128, 128)
    mask[:, :, 64:] = 1
    dark = torch.full((3, 128, 128), -1.0)
    dark[:, ::16] = 1.0
    report = report_of(pair_pictures([dark], [], [mask]))
    shown = np.asarray(contact_sheet(report).crop((20, 60, 200, 200)))
    bare = np.asarray(contact_sheet(report_of(pair_pictures([dark], [], []))).crop((20, 60, 200, 200)))
    assert shown.shape == bare.shape and shown[:, :60].mean() > bare[:, :60].mean() + 30


@pytest.mark.parametrize("white", [torch.ones(1, 128, 128), torch.full((1, 128, 128), 255).byte()])
def test_a_mask_that_is_white_everywhere_is_none(white):
    """ComfyUI's nodes give one for a photo without a mask. The report told of masks that nobody made."""
    half = white.clone()
    half[:, :, 64:] = 0
    pictures = [Picture(blocks(i), mask=mask) for i, mask in enumerate((white, half, None))]
    report = report_of(pictures)
    assert [photo.mask_from for photo in report.photos] == ["", "input", ""]
    assert "1 with masks" in report.headline


def test_reports_of_tensors_and_files_are_one_value():
    """What ComfyUI hands over is reported in the same words."""
    pictures = pair_pictures([blocks(0), blocks(1), blocks(1)], ["a", "", "c"], [])
    report = report_of(pictures).checked()
    assert report.headline == "3 photos, 2 with captions"
    assert report.lines()[1] == "  picture 1: 128x128, caption given"
    assert [warning.kind for warning in report.warnings] == ["duplicate"]
    assert report.to_json()["taken"][0] == {"file": "picture 1", "width": 128, "height": 128, "caption": "a",
                                            "caption_from": "input", "mask_from": None}

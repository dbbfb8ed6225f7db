"""Training pictures: reading whatever PIL reads, naming what it cannot, squares with masks, batches."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.data.folder import read_folder
from continual_concepts.core.data.framing import Framing, Picture, bucket_of, frame
from continual_concepts.core.data.pictures import pair_pictures, photo_digest, signed, weights
from continual_concepts.core.data.reading import read_photo
from continual_concepts.core.data.training_set import BucketSet, TrainingSet, prepare
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.training.config import TrainingConfig


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(("b.png", "a.JPG")):
        Image.new("RGB", (20, 10), (255 * i, 0, 0)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("\ufeffa red dog\n", encoding="utf-8")
    (tmp_path / "._a.png").write_bytes(b"a Mac's shadow file")
    (tmp_path / "notes.md").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def test_a_folder_is_read_in_name_order_with_captions(folder):
    first, second = read_folder(folder).pictures
    assert (first.caption, second.caption) == ("a red dog", "") and first.pixels.shape == (3, 10, 20)
    assert first.pixels[0].mean() > 0.9 and second.pixels[0].mean() == -1
    assert len(first.digest) == 16 and first.digest != second.digest


def test_a_digest_is_of_the_pixels_not_of_the_file(tmp_path):
    """The same photo as another lossless file, renamed or turned by its metadata is the same photo; one
    changed level is not."""
    levels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
    image = Image.fromarray(levels)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.bmp")
    turned = Image.Exif()
    turned[0x0112] = 6      # to be turned by 90 degrees to the right
    image.rotate(90, expand=True).save(tmp_path / "c.png", exif=turned)
    levels[0, 0, 0] ^= 1
    Image.fromarray(levels).save(tmp_path / "d.png")
    same, other, upright, changed = (picture.digest for picture in read_folder(tmp_path).pictures)
    assert same == other == upright != changed


def test_a_digest_is_the_hash_of_its_levels():
    """Also of pictures that went through ComfyUI's 0..1 and back."""
    levels = torch.arange(256, dtype=torch.uint8).repeat(3).view(3, 16, 16)
    expected = hashlib.sha256(levels.numpy().tobytes()).hexdigest()[:16]
    assert photo_digest(levels.float() / 127.5 - 1) == photo_digest(levels.float() / 255 * 2 - 1) == expected


def test_pictures_are_paired_with_captions_and_masks():
    photos, mask = [torch.zeros(3, 4, 6), torch.ones(3, 5, 5)], torch.ones(1, 4, 6)
    assert [p.caption for p in pair_pictures(photos, [], [])] == ["", ""]
    assert [p.caption for p in pair_pictures(photos, [" a dog "], [])] == ["a dog", "a dog"]
    first, second = pair_pictures(photos, ["a", "b"], [mask, torch.ones(1, 5, 5)])
    assert (first.caption, second.caption) == ("a", "b") and first.mask is mask
    assert second.digest == photo_digest(photos[1])
    for captions, masks, wrong in ((["a"] * 3, [], "3 captions for 2"), ([], [mask], "1 masks for 2"),
                                   ([], [mask, mask], "mask 2 is 6x4")):
        with pytest.raises(ConceptError, match=wrong):
            pair_pictures(photos, captions, masks)


def test_masks_and_captions_from_other_folders(folder, tmp_path):
    extra = tmp_path / "extra"
    extra.mkdir()
    Image.new("L", (40, 20), 255).save(extra / "a.png")
    (extra / "b.txt").write_text("a cat")
    first, second = read_folder(folder, captions=extra, masks=extra).pictures
    assert first.mask.shape == (1, 10, 20) and weights(first.mask).mean() == 1 and second.mask is None
    assert second.caption == "a cat"


@pytest.mark.parametrize(("mode", "colour", "expected"), [
    ("RGB", (255, 0, 0), (1, -1, -1)), ("L", 255, (1, 1, 1)), ("1", 1, (1, 1, 1)), ("P", 0, None),
    ("CMYK", (0, 0, 0, 0), (1, 1, 1)),
    ("RGBA", (0, 0, 0, 0), (1, 1, 1)), ("LA", (0, 0), (1, 1, 1)), ("I;16", 65535, (1, 1, 1)),
    ("I;16", 257 * 51, (-0.6, -0.6, -0.6)),
    ("I", 255, (1, 1, 1)),
])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode, colour, expected):
    path = tmp_path / ("a.tif" if mode in ("CMYK", "I;16", "I") else "a.png")
    if mode == "I;16":
        Image.fromarray(np.full((4, 4), colour, np.uint16)).save(path)
    else:
        Image.new(mode, (4, 4), colour).save(path)
    pixels = signed(read_photo(path).levels)
    assert pixels.shape == (3, 4, 4) and pixels.abs().max() <= 1
    if expected is not None:
        assert torch.allclose(pixels[:, 2, 2], torch.tensor(expected, dtype=torch.float32), atol=0.01)


def test_turned_photos_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert read_photo(tmp_path / "a.jpg").levels.shape == (3, 20, 10)


def damaged_png(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])


SPOILS = [lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"GIF89a"), lambda p: p.write_text("text"),
          damaged_png]


@pytest.mark.parametrize("spoil", SPOILS)
def test_unreadable_pictures_are_named(folder, spoil):
    spoil(folder / "b.png")
    with pytest.raises(ConceptError, match="b.png"):
        read_folder(folder)


def test_an_unreadable_mask_is_named(folder, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    (masks / "a.png").write_bytes(b"no mask")
    with pytest.raises(ConceptError, match="mask.*masks.a.png"):
        read_folder(folder, masks=masks)


@pytest.mark.parametrize("arguments", [("missing",), ("empty",), ("full", "missing"),
                                       ("full", None, "missing")])
def test_missing_and_empty_folders_are_named(folder, tmp_path, arguments):
    (tmp_path / "empty").mkdir()
    paths = {"missing": tmp_path / "missing", "empty": tmp_path / "empty", "full": folder, None: None}
    with pytest.raises(ConceptError, match="missing|empty"):
        read_folder(*(paths[a] for a in arguments))


@pytest.mark.parametrize("size", [(10, 20), (20, 10), (33, 7), (16, 16), (1, 50), (17, 16)])
@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_frames_are_squares(size, mode):
    framed = frame(Picture(torch.ones(3, *size)), Framing(16, mode))
    assert framed.pixels.shape == (3, 16, 16) and framed.mask.shape == (1, 16, 16)
    inside = framed.mask > 0
    assert torch.allclose(framed.pixels[:, inside[0]], torch.ones(()), atol=1e-4)
    assert not framed.pixels[:, ~inside[0]].any()
    share = 1.0 if mode == "crop" else min(size) / max(size)
    assert framed.mask.mean() == pytest.approx(share, abs=1 / 16)


def test_a_mask_is_framed_with_its_picture():
    mask = torch.zeros(1, 16, 32)
    mask[..., :16] = 1
    framed = frame(Picture(torch.zeros(3, 16, 32), mask=mask), Framing(16, "crop"))
    assert framed.mask[0, :, :8].all() and not framed.mask[0, :, 8:].any()


def pictures(own=3, prior=0):
    return [Picture(torch.full((3, 32, 32), i / 10), f"p{i}", is_prior=i >= own, digest=str(i))
            for i in range(own + prior)]


def test_preparing_encodes_each_picture_and_its_mirror_once(tiny_backbone):
    g = torch.Generator().manual_seed(0)
    picture = Picture(torch.rand(3, 32, 32, generator=g), "a dog", torch.rand(1, 32, 32, generator=g),
                      digest="x")
    data = prepare(tiny_backbone, [picture], "rex", "dog", Framing(32))
    assert len(data) == 2 and data.captions == ("a <rex>",) * 2 and data.digests == ("x",)
    mirrored = prepare(tiny_backbone, [Picture(picture.pixels.flip(-1), mask=picture.mask.flip(-1))], "rex",
                       "dog", Framing(32, flip=False))
    assert torch.allclose(data.latents[1:], mirrored.latents, atol=1e-5)
    assert torch.allclose(data.masks[1:], mirrored.masks)


def test_prior_pictures_come_along_with_their_weight(tiny_backbone):
    data = prepare(tiny_backbone, pictures(3, 2), "rex", "dog", Framing(32, flip=False))
    assert data.captions == ("<rex>, p0", "<rex>, p1", "<rex>, p2", "p3", "p4")
    assert data.digests == ("0", "1", "2")
    batch = data.draw(2, 0.25, torch.Generator().manual_seed(0))
    assert batch.is_prior.tolist() == [False, False, True, True]
    assert batch.weights.tolist() == [1, 1, 0.25, 0.25]
    flags = zip(batch.prompts, batch.is_prior.tolist(), strict=True)
    assert all((prompt in ("p3", "p4")) == is_prior for prompt, is_prior in flags)
    assert not data.draw(2, 0.0, torch.Generator().manual_seed(0)).is_prior.any()


@pytest.mark.parametrize(("count", "size"), [(3, 3), (3, 6), (2, 5), (5, 2)])
def test_a_batch_uses_pictures_evenly(tiny_backbone, count, size):
    data = prepare(tiny_backbone, pictures(count), "rex", "dog", Framing(32, flip=False))
    drawn = data.draw(size, 1.0, torch.Generator().manual_seed(0)).prompts
    times = [drawn.count(caption) for caption in data.captions]
    assert sum(times) == size and max(times) - min(times) <= 1


@pytest.mark.parametrize("make", [
    lambda b: prepare(b, [], "rex", "dog", Framing(32)),
    lambda b: prepare(b, pictures(0, 2), "rex", "dog", Framing(32)),
    lambda b: prepare(b, pictures(), "rex", "dog", Framing(30)),
    lambda b: prepare(b, pictures(), "rex", "dog", Framing(4)),
    lambda b: Framing(32, "stretch"),
])
def test_what_cannot_be_prepared_is_refused(tiny_backbone, make):
    with pytest.raises(ConceptError):
        make(tiny_backbone)


@pytest.mark.parametrize("settings", [
    {"steps": 0}, {"batch_size": 0}, {"caption_dropout": 1.0}, {"precision": "int8"}, {"schedule": "step"},
    {"optimizer": "LBFGS"},
    {"optimizer": "lr_scheduler"}, {"optimizer": "Optimizer"}, {"optimizer": None},
    {"weight_decay": -1},
    {"noise_offset": float("nan")},
])
def test_bad_training_settings_are_named(settings):
    with pytest.raises(ConceptError, match=next(iter(settings))):
        TrainingConfig(**settings)


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([256, 512, 1024]),
       st.sampled_from([32, 64]))
def test_buckets_fit_the_picture_and_the_area(height, width, resolution, step):
    tall, wide = bucket_of(height, width, resolution, step)
    assert tall % step == wide % step == 0 and step * step <= tall * wide <= resolution**2
    assert tall <= max(step, height) and wide <= max(step, width)      # nothing is made larger than it is
    assert bucket_of(width, height, resolution, step) in ((wide, tall), (tall, wide))


@pytest.mark.parametrize(("picture", "bucket"), [
    ((512, 512), (512, 512)), ((4000, 4000), (512, 512)), ((768, 1024), (448, 576)),
    ((1920, 1080), (640, 384)), ((300, 200), (256, 192)),
    ((2000, 500), (1024, 256)), ((40, 900), (64, 896)), ((900, 40), (896, 64)),
])
def test_buckets_of_usual_pictures(picture, bucket):
    assert bucket_of(*picture, 512, 64) == bucket


def shaped(*sizes, prior=0):
    found = [Picture(torch.full((3, *size), i / 10), f"p{i}", digest=str(i)) for i, size in enumerate(sizes)]
    return found + [Picture(torch.zeros(3, 32, 32), "prior", is_prior=True) for _ in range(prior)]


def test_pictures_keep_their_shape_in_buckets(tiny_backbone):
    multiple = tiny_backbone.picture_multiple
    side = 16 * multiple
    pictures = shaped((side, side), (side // 2, side), (side // 2, side), prior=1)
    data = prepare(tiny_backbone, pictures, "rex", "dog", Framing(side, "buckets", flip=False))
    assert isinstance(data, BucketSet) and len(data) == 5
    assert data.digests == ("0", "1", "2")      # the prior picture in both shapes
    shapes, generator = [], torch.Generator().manual_seed(0)
    for _ in range(60):
        batch = data.draw(1, 1.0, generator)
        assert batch.latents.shape[-2:] == batch.masks.shape[-2:] and batch.is_prior.tolist() == [False, True]
        assert (batch.prompts[0] == "<rex>, p0") == (batch.latents.shape[-2:] == (16, 16))
        shapes.append(tuple(batch.latents.shape[-2:]))
    assert set(shapes) == {(16, 16), (8, 16)} and 10 < shapes.count((16, 16)) < 30      # one picture in three
    with pytest.raises(ConceptError, match="needs all pictures in one shape"):
        _ = data.latents


def test_one_bucket_is_a_plain_set(tiny_backbone):
    side = 8 * tiny_backbone.picture_multiple
    pictures = shaped((side, side), (side, side))
    data, plain = (prepare(tiny_backbone, pictures, "rex", "dog", Framing(side, mode))
                   for mode in ("buckets", "crop"))
    assert isinstance(data, TrainingSet) and torch.equal(data.latents, plain.latents)
    assert data.digests == plain.digests


def test_learning_from_buckets(tiny_backbone, teach):
    side, bank = 16 * tiny_backbone.picture_multiple, ConceptBank(tiny_backbone.layout)
    some = {"pictures": shaped((side, side), (side // 2, side)), "resolution": side, "framing": "buckets",
            "batch_size": 1, "steps": 6}
    first = teach(tiny_backbone, bank, **some)
    assert first.losses == teach(tiny_backbone, bank, **some).losses and len(set(first.losses)) == 6
    with pytest.raises(ConceptError, match="needs all pictures in one shape"):
        teach(tiny_backbone, bank, method="l2dm", **some)

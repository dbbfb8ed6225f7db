"""Photos are told from drawings, where a base knows only drawings."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw

from continual_concepts.core.cli import backbones
from continual_concepts.core.cli.parser import build_parser
from continual_concepts.core.data.pictures import Picture
from continual_concepts.core.data.report import report_of
from continual_concepts.core.demo.bases import called
from continual_concepts.core.images import to_tensor

SIDES = [64, 96, 128]
LARGE = 3      # drawings are drawn larger and averaged down, as painting programs do


def warns(pictures: list[Image.Image], resolution: int = 64) -> bool:
    taken = [Picture(to_tensor(picture)[0].permute(2, 0, 1) * 2 - 1, name=f"{number}.png")
             for number, picture in enumerate(pictures)]
    report = report_of(taken, resolution).checked(resolution, drawing_base="embedded")
    return "photos" in {warning.kind for warning in report.warnings}


def fade(side: int, rng: np.random.Generator) -> Image.Image:
    """A gradient from one colour to another."""
    one, other = rng.integers(0, 256, (2, 3))
    share = np.linspace(0, 1, side)[:, None, None]
    levels = (one + (other - one) * share).round().astype(np.uint8).repeat(side, 1)
    return Image.fromarray(levels if rng.random() < 0.5 else np.ascontiguousarray(levels.transpose(1, 0, 2)))


def colour(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(rng.integers(0, 256, 3).tolist())


def landscape(side: int, rng: np.random.Generator) -> Image.Image:
    """A sky with a gradient, a sun, and ground."""
    picture = fade(side, rng)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0.7 * side, side, side), fill=colour(rng))
    draw.ellipse((0.2 * side, 0.2 * side, 0.6 * side, 0.6 * side), fill=colour(rng))
    return picture


def scribble(side: int, rng: np.random.Generator) -> Image.Image:
    picture = Image.new("RGB", (side, side), "white")
    for _ in range(30):
        points = [tuple(point) for point in (side * rng.random((4, 2))).tolist()]
        ImageDraw.Draw(picture).line(points, fill=colour(rng), width=side // 40)
    return picture


def dots(side: int, rng: np.random.Generator) -> Image.Image:
    picture = Image.new("RGB", (side, side), "white")
    for x, y, size in (side * rng.random((120, 3)) * (1, 1, 0.07)).tolist():
        ImageDraw.Draw(picture).ellipse((x - size, y - size, x + size, y + size), fill=colour(rng))
    return picture


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("draw", [fade, landscape, scribble, dots])
def test_drawings_with_gradients_and_many_colours_are_no_photos(draw, side):
    rng = np.random.default_rng(side)
    drawn = [draw(LARGE * side, rng).resize((side, side), Image.Resampling.BOX) for _ in range(5)]
    assert not warns(drawn, side)
    assert not warns([draw(side, rng) for _ in range(5)], side)


def texture(seed: int, side: int = 256) -> Image.Image:
    """A picture with the structure of photos: detail of every size, the finer the weaker, and few bright
    places."""
    rng = np.random.default_rng(seed)
    levels = sum(np.asarray(Image.fromarray(rng.normal(size=(size, size)).astype(np.float32)).resize(
        (side, side), Image.Resampling.BICUBIC)) / size**0.7 for size in (4, 8, 16, 32, 64, 128))
    low, high = np.percentile(levels, (0.1, 99.9))
    levels = 255 * ((levels - low) / (high - low)).clip(0, 1)**1.5
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def scaled(picture: Image.Image, factor: float, offset: float = 0) -> Image.Image:
    return picture.point(lambda level: round(factor * level + offset))


def on_white(picture: Image.Image, share: float) -> Image.Image:
    """A white page of which the picture takes this share of the area."""
    page = Image.new("RGB", picture.size, "white")
    inside = picture.resize(tuple(round(share**0.5 * side) for side in picture.size))
    page.paste(inside, tuple((whole - part) // 3 for whole, part in zip(page.size, inside.size, strict=True)))
    return page


def as_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as it is": lambda picture: picture,
    "dim": lambda picture: scaled(picture, 0.25),
    "foggy": lambda picture: scaled(picture, 0.2, 150),
    "half of a white page": lambda picture: on_white(picture, 0.51),
    "a white page": lambda picture: on_white(picture, 0.44),
    "grey": lambda picture: picture.convert("L").convert("RGB"),
    "JPEG": lambda picture: as_jpeg(picture, 60),
}


# more than photos of little texture bear
STRONG = {"dark": lambda picture: scaled(picture, 0.12),
          "in thick fog": lambda picture: scaled(picture, 0.12, 150),
          "a quarter of a page": lambda picture: on_white(picture, 0.25)}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("change", [*CHANGES, *STRONG])
def test_photos_are_told_in_the_dark_in_fog_and_on_a_page(change, side):
    assert warns([(CHANGES | STRONG)[change](texture(seed)) for seed in range(4)], side)


@pytest.mark.parametrize("change", CHANGES)
def test_the_photos_of_the_benchmark_are_told_however_they_were_taken(benchmark_photos, change):
    for concept in ("backpack", "cat", "cat2", "dog", "dog2", "duck_toy", "teddybear"):
        photos = []
        for file in sorted((benchmark_photos / "images" / concept).iterdir()):
            photo = Image.open(file).convert("RGB")
            photo.thumbnail((512, 512))
            photos.append(CHANGES[change](photo))
        assert warns(photos), concept


def test_pictures_too_small_to_tell_raise_no_warning():
    for size in ((1, 1), (5, 300), (300, 5)):
        assert not warns([texture(0).resize(size)])
    assert not warns([Image.new("RGB", (64, 64), "white")])


def test_a_base_is_called_as_it_was_chosen():
    """In the list of a node, and in a command."""
    assert called("embedded-128") == "embedded (embedded-128)"
    assert (called("embedded-64"), called("")) == ("embedded-64", "")
    for typed, name in (("embedded", "embedded (embedded-128)"), ("embedded-128", "embedded-128")):
        options = build_parser().parse_args(["learn", "x", "--name", "rex", "--bank", "new.safetensors",
                                             "--base", typed])
        assert backbones.called(options) == name

"""Draws the registry's pictures, docs/icon.png and docs/banner.png, at their own size.

Run it with the package installed: `.venv/bin/python .ci/registry_pictures.py`.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from continual_concepts.core.demo.render import render
from continual_concepts.core.demo.scenes import CONCEPTS, STYLES, Placed, Scene

DOCS = Path(__file__).resolve().parents[1] / "docs"
ICON, WIDTH, HEIGHT = 400, 1680, 720      # in pixels
SNOW_SKY = (190, 205, 225)      # also fills the corners beside the mountains
PANELS = (("rex", "meadow"), ("mimi", "beach"), ("bolt", "night"), ("fido", "snow"))


def drawn(name: str, background: str, side: int, size: float) -> Image.Image:
    """A concept in the middle of a square picture; size: its width as a fraction of the picture."""
    placed = Placed(CONCEPTS[name].thing, 0.5, 0.58, size)
    return Image.fromarray(render(Scene((placed,), background, SNOW_SKY, "white", STYLES["photo"]), side))


def banner() -> Image.Image:
    picture, width = Image.new("RGB", (WIDTH, HEIGHT)), WIDTH // len(PANELS)
    left = (HEIGHT - width) // 2
    for i, (name, background) in enumerate(PANELS):
        square = drawn(name, background, HEIGHT, 0.5)
        picture.paste(square.crop((left, 0, left + width, HEIGHT)), (i * width, 0))
    return picture


if __name__ == "__main__":
    drawn("rex", "snow", ICON, 0.72).save(DOCS / "icon.png", optimize=True)
    banner().save(DOCS / "banner.png", optimize=True)

"""Draws docs/icon.png, docs/banner.png and docs/photos.png, each at its own size.

Run it with the package installed: `.venv/bin/python .ci/pictures.py`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

from continual_concepts.core.bank.concepts import ConceptInfo, Provenance
from continual_concepts.core.data.contact_sheet import contact_sheet
from continual_concepts.core.data.folder import read_folder
from continual_concepts.core.demo.render import render
from continual_concepts.core.demo.scenes import CONCEPTS, STYLES, Placed, Scene

DOCS = Path(__file__).resolve().parents[1] / "docs"
ICON, WIDTH, HEIGHT, PHOTO = 400, 1680, 720, 512      # in pixels
SNOW_SKY = (190, 205, 225)      # also fills the corners beside the mountains
PANELS = (("rex", "meadow"), ("mimi", "beach"), ("bolt", "night"), ("fido", "snow"))
# background, centre, width and direction
PHOTOS = (("room", 0.64, 0.58, 0.62, False), ("room", 0.66, 0.6, 0.42, False),
          ("snow", 0.4, 0.52, 0.66, True), ("beach", 0.42, 0.6, 0.5, False),
          ("meadow", 0.62, 0.52, 0.48, False))
CAPTIONS = {1: "a photo of <rex> in a room", 2: "<rex> seen from the side", 4: "a photo of <rex> on a beach"}


def drawn(name: str, background: str, side: int, size: float, x: float = 0.5, y: float = 0.58,
          flip: bool = False) -> Image.Image:
    """A square picture of a concept; size: its width, x and y: its centre, as fractions of the picture."""
    placed = Placed(CONCEPTS[name].thing, x, y, size, flip)
    return Image.fromarray(render(Scene((placed,), background, SNOW_SKY, "white", STYLES["photo"]), side))


def banner() -> Image.Image:
    picture, width = Image.new("RGB", (WIDTH, HEIGHT)), WIDTH // len(PANELS)
    left = (HEIGHT - width) // 2
    for i, (name, background) in enumerate(PANELS):
        square = drawn(name, background, HEIGHT, 0.5)
        picture.paste(square.crop((left, 0, left + width, HEIGHT)), (i * width, 0))
    return picture


def fill(folder: Path) -> None:
    """Photos with most of the faults that a contact sheet shows."""
    (folder / "masks").mkdir()
    for i, (background, x, y, size, flip) in enumerate(PHOTOS, 1):
        photo = drawn("rex", background, PHOTO, size, x, y, flip)
        photo.save(folder / f"{i}.png")
        if i in CAPTIONS:
            (folder / f"{i}.txt").write_text(CAPTIONS[i], encoding="utf-8")
        if i in (2, 4):
            mask, around = Image.new("L", photo.size), 0.62 * size * PHOTO
            ImageDraw.Draw(mask).ellipse([x * PHOTO - around, y * PHOTO - around, x * PHOTO + around,
                                          y * PHOTO + around], 255)
            mask.save(folder / "masks" / f"{i}.png")
    Image.open(folder / "1.png").save(folder / "1 (copy).png")
    Image.open(folder / "4.png").resize((200, 200)).save(folder / "small.png")
    Image.open(folder / "2.png").filter(ImageFilter.GaussianBlur(14)).save(folder / "moved.png")
    for name in ("IMG_2044.heic", "raw.cr2", "notes.md", "dog.txt"):
        (folder / name).write_text("no picture", encoding="utf-8")


def photos() -> Image.Image:
    """The contact sheet of such a folder. Another concept of the bank was learned from the last photo."""
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder))
        report = read_folder(folder, resolution=PHOTO).report
        last = next(photo.digest for photo in report.photos if photo.name == f"{len(PHOTOS)}.png")
        fluffy = ConceptInfo("fluffy", "dog", "slots", ("fluffy-1",), provenance=Provenance(images=(last,)))
        return contact_sheet(report.checked(PHOTO, True, {"fluffy": fluffy}, "rex"))


if __name__ == "__main__":
    drawn("rex", "snow", ICON, 0.72).save(DOCS / "icon.png", optimize=True)
    banner().save(DOCS / "banner.png", optimize=True)
    photos().save(DOCS / "photos.png", optimize=True)

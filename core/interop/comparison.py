"""Two pictures of one concept side by side: drawn with its bank, and drawn from the files of an export.

The second one is drawn from a bank into which the files were imported, because an imported LoRA acts as it
does in other programs (see `importing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from ..bank.bank import ConceptBank
from ..bank.concepts import ConceptInfo
from ..images import INK, PAPER, QUIET, font, to_pil, wrapped
from ..model.backbone import Backbone
from ..sampling.sampling import sample
from ..sampling.settings import SampleSettings
from .importing import import_concept

SIDE, GAP, TITLE, TEXT = 384, 16, 17, 13      # least side of a picture, gap and font sizes in pixels
MOST_LINES = 6      # of one note


def read_back(info: ConceptInfo, files: Mapping[str, Path], backbone: Backbone) -> ConceptBank:
    """A bank with what other programs read from the files of an export.

    Args:
        info: The exported concept.
        files: Format -> file, in the order in which LoRA files are preferred. If no file holds the words,
            the class noun takes their place.
        backbone: The base.

    Raises:
        ConceptError: A file cannot be read.
    """
    lora = next((file for kind, file in files.items() if kind != "embedding"), None)
    has_words = bool({"embedding", "bundle"} & set(files))
    if lora is not None and "bundle" in files and "embedding" not in files:
        lora = files["bundle"]
    trigger = "" if has_words else info.class_noun or info.name
    read = import_concept(info.name, info.class_noun, info.kind, backbone.layout, backbone.text, lora,
                          files.get("embedding"), trigger, backbone=backbone)
    return ConceptBank(backbone.layout).add(read.concept)


def compared(bank: ConceptBank, name: str, prompt: str, files: Mapping[str, Path], lost: Sequence[str],
             backbone: Backbone, settings: SampleSettings, seed: int = 0) -> Image.Image:
    """Draws a concept with its bank and from exported files, with the same prompt, seed and settings.

    Args:
        bank: The bank that the files were exported from.
        prompt: It names the concept.
        files: See `read_back`.
        lost: What differs, printed below the pictures.
    """
    others = read_back(bank.infos[name], files, backbone)
    pictures = [sample(backbone, drawn_with, [prompt], [seed], settings)[0] for drawn_with in (bank, others)]
    read = " and ".join(file.name for file in files.values())
    headings = ("with the bank", f"in other programs, from {read}")
    title = f"{prompt}  (seed {seed}, {settings.steps} steps, guidance {settings.cfg:g})"
    what = [f"What differs: {reason}" for reason in lost] or ["Nothing differs, up to rounding."]
    return side_by_side(pictures, headings, title, what)


def side_by_side(pictures: Sequence[Tensor], headings: Sequence[str], title: str,
                 notes: Sequence[str]) -> Image.Image:
    """Pictures `[3, H, W]` in -1..1 beside one another, each below its heading; the notes are below them."""
    images = [to_pil(picture) for picture in pictures]
    factor = max(1, -(-SIDE // images[0].width))
    width, height = images[0].width * factor, images[0].height * factor
    full = len(images) * (width + GAP) + GAP
    heads = [wrapped(heading, font(TEXT), width, MOST_LINES) for heading in headings]
    tops = wrapped(title, font(TITLE), full - 2 * GAP, MOST_LINES)
    below = [line for note in notes for line in wrapped(note, font(TEXT), full - 2 * GAP, MOST_LINES)]
    line, large = round(1.4 * TEXT), round(1.4 * TITLE)
    y = 2 * GAP + len(tops) * large + max(map(len, heads)) * line
    image = Image.new("RGB", (full, y + height + (GAP + len(below) * line if below else 0) + GAP), PAPER)
    draw = ImageDraw.Draw(image)
    for i, text in enumerate(tops):
        draw.text((GAP, GAP + i * large), text, INK, font(TITLE))
    for column, (picture, head) in enumerate(zip(images, heads, strict=True)):
        x = GAP + column * (width + GAP)
        for i, text in enumerate(head):
            draw.text((x, GAP + len(tops) * large + GAP // 2 + i * line), text, QUIET, font(TEXT))
        image.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (x, y))
    for i, text in enumerate(below):
        draw.text((GAP, y + height + GAP + i * line), text, INK, font(TEXT))
    return image

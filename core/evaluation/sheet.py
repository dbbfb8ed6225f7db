"""Draws a bank's evaluation as one picture: a row per concept, and the confusion matrix."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ..images import (
    ACCENT,
    ALARM,
    EMPTY,
    GRID,
    INK,
    PAPER,
    QUIET,
    between,
    font,
    ink_on,
    spread,
    to_pil,
)
from .bankcheck import BankReport

SIDE, GAP, LABEL = 112, 8, 170
REFERENCES, SHOWN = 2, 6      # pictures per row


def _square(picture: Tensor) -> Image.Image:
    """A picture `[3, H, W]` in -1..1, cut to a square of `SIDE` pixels."""
    return ImageOps.fit(to_pil(picture), (SIDE, SIDE), Image.Resampling.LANCZOS)


def _row(image: Image.Image, draw: ImageDraw.ImageDraw, report: BankReport, index: int, y: int) -> None:
    name = report.names[index]
    reference = report.references[name]
    draw.text((10, y + 20), f"<{name}>"[:20], INK, font(15))
    draw.text((10, y + 44), f"alignment {100 * report.alignment(index):.1f}", INK, font(13))
    draw.text((10, y + 64), f"with its {reference.source}", QUIET, font(12))
    if report.nearest(index) != name:
        draw.text((10, y + 82), f"more like <{report.nearest(index)}>"[:24], ALARM, font(12))
    for i, picture in enumerate(spread(reference.pictures, REFERENCES)):
        image.paste(_square(picture), (LABEL + i * (SIDE + GAP), y))
    start = LABEL + REFERENCES * (SIDE + GAP) + GAP
    for i, picture in enumerate(spread(list(report.pictures[name]), SHOWN)):
        image.paste(_square(picture), (start + i * (SIDE + GAP), y))


def _matrix(draw: ImageDraw.ImageDraw, report: BankReport, cell: int, top: int) -> None:
    """The confusion matrix, shaded from its lowest to its highest value; the diagonal compares concepts with
    themselves."""
    low, high = float(report.confusion.min()), float(report.confusion.max())
    draw.text((10, top), "how much pictures of the row look like the photos of the column", INK, font(14))
    for j, name in enumerate(report.names):
        draw.text((LABEL + j * cell, top + 24), f"<{name}>"[: cell // 8], QUIET, font(12))
    for i, name in enumerate(report.names):
        y = top + 44 + 30 * i
        draw.text((10, y + 6), f"<{name}>"[:20], INK, font(13))
        for j in range(len(report.names)):
            value = float(report.confusion[i, j])
            share = (value - low) / (high - low) if high > low else 0.5
            fill = between(EMPTY, ACCENT, share)
            draw.rectangle([LABEL + j * cell, y, LABEL + (j + 1) * cell - 3, y + 27], fill,
                           outline=INK if i == j else GRID)
            draw.text((LABEL + j * cell + 6, y + 6), f"{100 * value:.1f}", ink_on(fill), font(12))


def _base(change: float | None) -> str:
    if change is None:
        return "not evaluated"
    if change == 0:
        return "the same pictures as without the bank, bit for bit"
    return f"{100 * change:.2f} % away from the pictures without the bank"


def sheet(report: BankReport) -> Image.Image:
    """References on the left, generated pictures on the right. Below them, the confusion matrix and the base
    change.
    """
    count, cell = len(report.names), 64
    rows, matrix = 34 + count * (SIDE + GAP), 44 + 30 * count
    wide = LABEL + (REFERENCES + SHOWN) * (SIDE + GAP) + 2 * GAP
    image = Image.new("RGB", (max(wide, LABEL + count * cell + GAP), rows + matrix + 48), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((LABEL, 10), "compared with", QUIET, font(12))
    draw.text((LABEL + REFERENCES * (SIDE + GAP) + GAP, 10), "drawn with the bank", QUIET, font(12))
    for i in range(count):
        _row(image, draw, report, i, 34 + i * (SIDE + GAP))
    _matrix(draw, report, cell, rows + 4)
    draw.text((10, rows + matrix + 20), f"prompts without concepts: {_base(report.base_change)}", INK,
              font(13))
    return image


def lines(report: BankReport) -> str:
    """The figures as text: a line per concept, and one for the base."""
    rows = []
    for i, name in enumerate(report.names):
        confused = "" if report.nearest(i) == name else f"; more like <{report.nearest(i)}>"
        rows.append(f"<{name}>: alignment {100 * report.alignment(i):.1f} with its "
                    f"{report.references[name].source}{confused}")
    return "\n".join([*rows, f"prompts without concepts: {_base(report.base_change)}"])

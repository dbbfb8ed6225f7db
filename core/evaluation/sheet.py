"""A bank's report as one picture: a row per concept, and the matrix of who looks like whom."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ..images import ACCENT, GRID, INK, PAPER, QUIET, font, spread
from .bankcheck import BankReport

SIDE, GAP, LABEL = 112, 8, 170
REFERENCES, SHOWN = 2, 6      # pictures of each concept that there is room for


def _pil(picture: Tensor) -> Image.Image:
    """`[3, H, W]` in -1..1 as a square."""
    pixels = ((picture.float().cpu().permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    return ImageOps.fit(Image.fromarray(pixels), (SIDE, SIDE), Image.LANCZOS)


def _row(image: Image.Image, draw: ImageDraw.ImageDraw, report: BankReport, index: int, y: int) -> None:
    name = report.names[index]
    reference = report.references[name]
    draw.text((10, y + 20), f"<{name}>"[:20], INK, font(15))
    draw.text((10, y + 44), f"alignment {100 * float(report.bleed[index, index]):.1f}", INK, font(13))
    draw.text((10, y + 64), f"with its {reference.source}", QUIET, font(12))
    if report.nearest(index) != name:
        draw.text((10, y + 82), f"more like <{report.nearest(index)}>"[:24], (190, 40, 30), font(12))
    for i, picture in enumerate(spread(reference.pictures, REFERENCES)):
        image.paste(_pil(picture), (LABEL + i * (SIDE + GAP), y))
    start = LABEL + REFERENCES * (SIDE + GAP) + GAP
    for i, picture in enumerate(spread(report.pictures[name], SHOWN)):
        image.paste(_pil(picture), (start + i * (SIDE + GAP), y))


def _matrix(draw: ImageDraw.ImageDraw, report: BankReport, cell: int, top: int) -> None:
    """Shades from the lowest to the highest value; the diagonal is every concept with itself."""
    low, high = float(report.bleed.min()), float(report.bleed.max())
    draw.text((10, top), "how much pictures of the row look like the photos of the column", INK, font(14))
    for j, name in enumerate(report.names):
        draw.text((LABEL + j * cell, top + 24), f"<{name}>"[: cell // 8], QUIET, font(12))
    for i, name in enumerate(report.names):
        y = top + 44 + 30 * i
        draw.text((10, y + 6), f"<{name}>"[:20], INK, font(13))
        for j in range(len(report.names)):
            value = float(report.bleed[i, j])
            share = (value - low) / (high - low) if high > low else 0.5
            fill = tuple(int(p + (c - p) * share) for p, c in zip((238, 238, 240), ACCENT, strict=True))
            draw.rectangle([LABEL + j * cell, y, LABEL + (j + 1) * cell - 3, y + 27], fill, outline=INK if i == j else GRID)
            draw.text((LABEL + j * cell + 6, y + 6), f"{100 * value:.1f}", PAPER if share > 0.55 else INK, font(12))


def _base(drift: float | None) -> str:
    if drift is None:
        return "not looked at"
    return f"{100 * drift:.2f} % away from the pictures without the bank" if drift else "the same pictures as without the bank, bit for bit"


def sheet(report: BankReport) -> Image.Image:
    """Left the references, right the drawn pictures of every concept; below the matrix and what became of the base."""
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
    draw.text((10, rows + matrix + 20), f"prompts without concepts: {_base(report.drift)}", INK, font(13))
    return image


def lines(report: BankReport) -> str:
    """A line per concept, and one for the base."""
    found = [f"<{name}>: alignment {100 * float(report.bleed[i, i]):.1f} with its {report.references[name].source}"
             + ("" if report.nearest(i) == name else f"; more like <{report.nearest(i)}>") for i, name in enumerate(report.names)]
    return "\n".join([*found, f"prompts without concepts: {_base(report.drift)}"])

"""Draws the report on photos as a contact sheet: thumbnails with marks, and what was not used."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageChops, ImageDraw

from ..images import (
    ACCENT,
    ALARM,
    ALARM_PAPER,
    CARD_PAPER,
    GRID,
    INK,
    PAPER,
    QUIET,
    Colour,
    fitting,
    font,
    ink_on,
    wrapped,
)
from .report import PhotoFacts, Report

COLUMNS, MOST = 5, 40      # cards per row, and in all
FEW, PAIR = 6, 2      # so few cards stand in pairs, because their texts are then readable on a node
SIDE, PAD, GAP = 192, 10, 10      # side of a thumbnail's box, in pixels
CARD = SIDE + 2 * PAD
TEXT, NAME, HEADING = 12, 14, 18      # font sizes
CHIP, CHIP_GAP = 19, 4      # height of a mark, and the space between marks
ROWS = 8      # lines of warnings, and of files that were not used
MASK = (58, 204, 182)
FADED, SHADE = (128, 130, 140), 0.8      # what a mask's black shows in place of the picture, and its share
CHIPS = {"duplicate": "same", "alike": "alike", "small": "small", "blurred": "blurred", "flat": "one colour",
         "bank": "in the bank"}      # kind of warning -> its mark
Chip = tuple[str, Colour, bool]      # text, colour, whether it is filled
Line = tuple[str, int, Colour]      # text, font size, colour


def _chips(report: Report, index: int) -> list[Chip]:
    """The marks of one photo."""
    photo = report.photos[index]
    chips: list[Chip] = [("caption", ACCENT, True) if photo.caption else ("no caption", QUIET, False)]
    chips += [("mask", MASK, True)] if photo.mask_from else []
    chips += [(f"{photo.repeats} repeats", QUIET, False)] if photo.repeats != 1 else []
    kinds = [warning.kind for warning in report.warnings if index in warning.photos]
    return [*chips, *((CHIPS[kind], ALARM, True) for kind in dict.fromkeys(kinds) if kind in CHIPS)]


def _boxes(chips: Sequence[Chip]) -> list[tuple[float, int, float]]:
    """Left, top and width of each mark. Marks that do not fit into a row begin the next one."""
    x, y = 0.0, 0
    boxes = []
    for text, _, _ in chips:
        width = font(TEXT).getlength(text) + 14
        if x and x + width > SIDE:
            x, y = 0.0, y + CHIP + CHIP_GAP
        boxes.append((x, y, width))
        x += width + CHIP_GAP
    return boxes


def _height_of_chips(chips: Sequence[Chip]) -> int:
    return _boxes(chips)[-1][1] + CHIP + CHIP_GAP      # a photo has at least one


def _draw_chips(draw: ImageDraw.ImageDraw, left: int, top: int, chips: Sequence[Chip]) -> None:
    for (text, shade, is_filled), (x, y, width) in zip(chips, _boxes(chips), strict=True):
        x, y = left + x, top + y
        fill = shade if is_filled else CARD_PAPER
        draw.rounded_rectangle([x, y, x + width, y + CHIP], CHIP // 2, fill, shade)
        draw.text((x + width / 2, y + CHIP / 2), text, ink_on(shade) if is_filled else shade, font(TEXT),
                  anchor="mm")


def _thumbnail(photo: PhotoFacts) -> Image.Image:
    """The photo's thumbnail; where its mask is black, the picture fades."""
    picture = photo.quality.thumbnail
    factor = SIDE // max(picture.size)
    if factor > 1:      # single pixels are shown as such
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if photo.mask is None:
        return picture
    faded = Image.blend(picture, Image.new("RGB", picture.size, FADED), SHADE)
    mask = photo.mask.resize(picture.size)
    masked = Image.composite(picture, faded, mask)
    inside = mask.point(lambda level: 255 * (level > 127))
    masked.paste(MASK, (0, 0), ImageChops.subtract(inside, _eroded(inside)))
    return masked


def _eroded(mask: Image.Image) -> Image.Image:
    """A mask without its outermost two pixels. The border of the picture counts as outside."""
    smaller = mask
    for step in ((2, 0), (-2, 0), (0, 2), (0, -2)):
        shifted = Image.new("L", mask.size)
        shifted.paste(mask, step)
        smaller = ImageChops.darker(smaller, shifted)
    return smaller


def _text(photo: PhotoFacts) -> list[Line]:
    lines = [(fitting(photo.name, font(NAME), SIDE), NAME, INK),
             (f"{photo.width} x {photo.height}", TEXT, QUIET)]
    lines += [(line, TEXT, INK) for line in wrapped(photo.caption, font(TEXT), SIDE, 2)]
    return lines + [(line, TEXT, QUIET) for line in wrapped(photo.note, font(TEXT), SIDE, 2)]


def _draw_card(image: Image.Image, draw: ImageDraw.ImageDraw, report: Report, index: int,
               box: tuple[int, int, int]) -> None:
    """box: left, top, height."""
    left, top, height = box
    photo = report.photos[index]
    is_red = any(index in warning.photos and warning.kind in CHIPS for warning in report.warnings)
    draw.rectangle([left, top, left + CARD - 1, top + height - 1], ALARM_PAPER if is_red else CARD_PAPER,
                   ALARM if is_red else GRID)
    x, y = left + PAD, top + PAD
    draw.rectangle([x, y, x + SIDE - 1, y + SIDE - 1], GRID)
    picture = _thumbnail(photo)
    image.paste(picture, (x + (SIDE - picture.width) // 2, y + (SIDE - picture.height) // 2))
    y += SIDE + 8
    chips = _chips(report, index)
    _draw_chips(draw, x, y, chips)
    _draw_lines(draw, x, y + _height_of_chips(chips) + 2, _text(photo))


def _draw_lines(draw: ImageDraw.ImageDraw, x: int, y: int, lines: Sequence[Line]) -> int:
    """Draws lines of text. Returns the place below them."""
    for text, size, shade in lines:
        draw.text((x, y), text, shade, font(size))
        y += round(1.35 * size)
    return y


def _height(lines: Sequence[Line]) -> int:
    return sum(round(1.35 * size) for _, size, _ in lines)


def _heading(report: Report, shown: int, width: int) -> list[Line]:
    text = report.headline + (f"; {shown} are shown" if shown < len(report.photos) else "")
    lines: list[Line] = [(line, HEADING, INK) for line in wrapped(text, font(HEADING), width, 2)]
    warnings = [(line, NAME, ALARM if warning.kind in (*CHIPS, "few") else INK) for warning in report.warnings
                for line in wrapped(warning.text, font(NAME), width, 3)]
    return lines + _first(warnings)


def _footing(report: Report, width: int) -> list[Line]:
    """Files that were not used, by reason."""
    if not report.skipped:
        return []
    lines = [(line, NAME, QUIET) for reason, names in report.reasons().items()
             for line in wrapped(f"{', '.join(names)}: {reason}", font(NAME), width, 2)]
    return [("not used", NAME, INK), *_first(lines)]


def _first(lines: list[Line]) -> list[Line]:
    if len(lines) <= ROWS:
        return lines
    return [*lines[: ROWS - 1], ("and more; the text lists all", lines[0][1], lines[0][2])]


def contact_sheet(report: Report) -> Image.Image:
    """Draws a report: a card per photo, warnings above, files that were not used below. Photos with a mask
    fade where they are not learned. If there are many photos, those with warnings come first."""
    warned = {i for warning in report.warnings if warning.kind in CHIPS for i in warning.photos}
    order = list(range(len(report.photos)))
    if len(order) > MOST:
        order = sorted(order, key=lambda i: i not in warned)[:MOST]
    columns = COLUMNS if len(order) > FEW else PAIR
    width = GAP + columns * (CARD + GAP)
    heading, footing = _heading(report, len(order), width - 2 * GAP), _footing(report, width - 2 * GAP)
    rows = [order[i : i + columns] for i in range(0, len(order), columns)]
    heights = [max(2 * PAD + SIDE + 10 + _height_of_chips(_chips(report, i))
                   + _height(_text(report.photos[i])) for i in row) for row in rows]
    total = GAP + _height(heading) + GAP + sum(height + GAP for height in heights)
    image = Image.new("RGB", (width, total + (_height(footing) + GAP if footing else 0)), PAPER)
    draw = ImageDraw.Draw(image)
    y = _draw_lines(draw, GAP, GAP, heading) + GAP
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            _draw_card(image, draw, report, i, (GAP + column * (CARD + GAP), y, height))
        y += height + GAP
    _draw_lines(draw, GAP, y, footing)
    return image

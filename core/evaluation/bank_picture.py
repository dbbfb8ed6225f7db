"""Draws a bank as a table of cards with thumbnail, name, class noun, kind, method, size and most similar
concept. Collisions are red.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageOps

from ..bank.tokens import listed
from ..images import ALARM, ALARM_PAPER, CARD_PAPER, GRID, INK, PAPER, QUIET, Colour, font, opened, wrapped
from .inspection import Facts, Inspection, nearest_text

WIDTH, HEIGHT, GAP, PAD = 1200, 1400, 10, 10      # maximum size of a page in pixels
NARROW = 406      # width of a page with one column: about that of a node, so its texts are readable there
PAGES = 4      # maximum that stays readable in a preview
NAME_LINES, OTHER_LINES = 4, 2      # 64 of the widest letters still fit


@dataclass(frozen=True)
class CardStyle:
    """columns: cards per row; side: side of a thumbnail in pixels; names: font sizes for names, of which the
    largest that fits is used; text: font size of all other text.
    """

    columns: int
    side: int
    names: tuple[int, ...]
    text: int


COLUMN, LARGE = CardStyle(1, 112, (17, 15, 13), 13), CardStyle(3, 112, (17, 15, 13), 13)
SMALL = CardStyle(4, 60, (14, 12, 11), 11)
FEW, MANY = 4, 24      # maximum number of concepts in one column, and on large cards
Line = tuple[str, int, Colour]      # text, font size, colour


def _lines(text: str, size: int, width: float, colour: tuple[int, int, int],
           most: int = OTHER_LINES) -> list[Line]:
    return [(line, size, colour) for line in wrapped(text, font(size), width, most)]


def _text_of(facts: Facts, inspection: Inspection, style: CardStyle, width: float) -> list[Line]:
    """The text next to a thumbnail."""
    size = next((s for s in style.names if font(s).getlength(facts.placeholder) <= width), style.names[-1])
    lines = _lines(facts.placeholder, size, width, INK, NAME_LINES)
    lines += _lines(f"{facts.class_noun or 'no class noun'}, {facts.kind}", style.text, width, INK)
    if facts.fault:
        return [*lines, *_lines("cannot be read", style.text, width, ALARM)]
    lines += _lines(f"{facts.way}; {facts.stores}", style.text, width, QUIET)
    lines += _lines(f"{facts.steps} steps, {facts.nbytes / 1000:,.0f} kB", style.text, width, QUIET, 1)
    if facts.terms:
        lines += _lines(str(facts.terms), style.text, width, QUIET, NAME_LINES)
    nearest, red = inspection.nearest(facts.name), inspection.partners(facts.name)
    if nearest is not None:
        lines += _lines(nearest_text(nearest), style.text, width, QUIET, NAME_LINES + 1)
    if red:
        lines += _lines(f"collides with {listed(red)}", style.text, width, ALARM, NAME_LINES)
    return lines


def _height(lines: Sequence[Line]) -> int:
    return sum(round(1.35 * size) for _, size, _ in lines)


def _card(image: Image.Image, draw: ImageDraw.ImageDraw, place: tuple[int, int, int, int], facts: Facts,
          lines: Sequence[Line],
          side: int, red: bool) -> None:
    """Draws a card; place: left, top, width, height."""
    x, y, width, height = place
    draw.rectangle([x, y, x + width - 1, y + height - 1], ALARM_PAPER if red else CARD_PAPER,
                   ALARM if red else GRID, 2 if red else 1)
    x, y = x + PAD, y + PAD
    draw.rectangle([x, y, x + side - 1, y + side - 1], GRID)
    picture = opened(facts.thumbnail)
    if picture is not None:
        image.paste(ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS), (x, y))
    else:
        draw.text((x + side / 2, y + side / 2), "no\nthumbnail", QUIET, font(11), anchor="mm", align="center")
    x += side + PAD
    for text, size, colour in lines:
        draw.text((x, y), text, colour, font(size))
        y += round(1.35 * size)


def _heading(inspection: Inspection, shown: int, width: int) -> list[Line]:
    """The heading: counts, then warnings."""
    count, size = len(inspection.facts), sum(facts.nbytes for facts in inspection.facts)
    text = f"{count} concept{'' if count == 1 else 's'}, {size / 1e6:.2f} MB"
    text += f"; {shown} are shown, those that collide first" if shown < count else ""
    lines = [(text if count else "the bank is empty", 17, INK)]
    if inspection.made_on:
        lines += _lines(f"made on {inspection.made_on}", 13, width, QUIET)
    for warning in inspection.warnings[:3]:
        lines += _lines(warning, 13, width, ALARM)
    unlisted = len(inspection.warnings) - 3
    return [*lines, (f"and {unlisted} more; the text lists them all", 13, ALARM)] if unlisted > 0 else lines


def _page(inspection: Inspection, style: CardStyle, cards: Sequence[tuple[Facts, list[Line]]],
          heading: list[Line], size: tuple[int, int],
          card: tuple[int, int]) -> Image.Image:
    """Draws one page. size: size of the page; card: width and height of every card."""
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    y = GAP
    for text, letters, colour in heading:
        draw.text((GAP, y), text, colour, font(letters))
        y += round(1.35 * letters)
    for i, (facts, lines) in enumerate(cards):
        place = (GAP + (i % style.columns) * (card[0] + GAP),
                 y + GAP + (i // style.columns) * (card[1] + GAP), *card)
        _card(image, draw, place, facts, lines, style.side,
              bool(facts.fault or inspection.partners(facts.name)))
    return image


def bank_pages(inspection: Inspection) -> list[Image.Image]:
    """Draws pages of equal size; a single page for few concepts.

    Shows all concepts of banks with up to a few hundred. Of larger banks, colliding concepts come first and
    some others are left out.
    """
    count = len(inspection.facts)
    style, wide = (COLUMN, NARROW) if count <= FEW else (LARGE if count <= MANY else SMALL, WIDTH)
    width = (wide - (style.columns + 1) * GAP) // style.columns
    beside = width - style.side - 3 * PAD
    cards = [(facts, _text_of(facts, inspection, style, beside)) for facts in inspection.facts]
    height = max([style.side, *(_height(lines) for _, lines in cards)]) + 2 * PAD
    heading = _heading(inspection, len(cards), wide - 2 * GAP)
    rows = max(1, (HEIGHT - _height(heading) - 2 * GAP) // (height + GAP))
    if len(cards) > PAGES * rows * style.columns:
        # a stable sort keeps the bank's order
        cards.sort(key=lambda card: not (card[0].fault or inspection.partners(card[0].name)))
        cards = cards[: PAGES * rows * style.columns]
        heading = _heading(inspection, len(cards), wide - 2 * GAP)
    rows = max(1, min(rows, -(-len(cards) // style.columns)))
    size = (wide, 2 * GAP + _height(heading) + rows * (height + GAP) if cards else 60)
    on_page = rows * style.columns
    parts = [cards[i : i + on_page] for i in range(0, len(cards), on_page)] or [[]]
    return [_page(inspection, style, part, heading, size, (width, height)) for part in parts]

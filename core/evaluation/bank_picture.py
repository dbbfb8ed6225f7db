"""A bank as a table of cards: thumbnail, name, class noun, kind, method, size, the most similar concept; those that collide in red."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageOps

from ..images import GRID, INK, PAPER, QUIET, fitting, opened
from ..images import font as made_font
from .collisions import listed
from .inspection import Facts, Inspection

ALARM, ALARM_PAPER = (190, 40, 30), (255, 238, 235)
WIDTH, HEIGHT, GAP, PAD = 1200, 1400, 10, 10      # of a page, in pixels; a page of a few concepts is smaller
PAGES = 4      # what a preview still shows well; of more concepts those that collide come first
font = cache(made_font)      # a thousand cards ask for one of a few sizes
NAME_LINES, OTHER_LINES = 4, 2      # 64 of the widest letters still fit


@dataclass(frozen=True)
class CardStyle:
    """columns of cards; side of a thumbnail; sizes of a name's letters, the largest that fits on a line is taken; size of the rest."""

    columns: int
    side: int
    names: tuple[int, ...]
    text: int


LARGE, SMALL = CardStyle(3, 112, (17, 15, 13), 13), CardStyle(4, 60, (14, 12, 11), 11)
MANY = 24      # more concepts than these have small cards
Line = tuple[str, int, tuple[int, int, int]]      # text, size of its letters, colour


def _readable(text: str) -> str:
    """What can be drawn: a bank may come from anywhere, and half a pair of surrogates is no letter."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())[:400]


def wrapped(text: str, face, width: float, most: int) -> list[str]:
    """A text on at most that many lines, each at most `width` pixels wide; broken between words, and within those that are too wide. "..."
    where there is more of it."""
    lines, rest = [], _readable(text)
    while rest and len(lines) < most:
        end = bisect_right(range(1, len(rest) + 1), width, key=lambda count: face.getlength(rest[:count]))      # so many letters fit
        if end == len(rest):
            return [*lines, rest]
        if len(lines) == most - 1:
            return [*lines, fitting(rest[: end + 1], face, width)]
        marks = rest.rfind(" ", 0, end + 1), max(rest.rfind(mark, 0, end) + 1 for mark in "-_")
        end = next((mark for mark in marks if mark > end // 2), max(1, end))
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return lines


def _lines(text: str, size: int, width: float, colour: tuple[int, int, int], most: int = OTHER_LINES) -> list[Line]:
    return [(line, size, colour) for line in wrapped(text, font(size), width, most)]


def _said(facts: Facts, found: Inspection, look: CardStyle, width: float) -> list[Line]:
    """What stands beside a thumbnail."""
    size = next((s for s in look.names if font(s).getlength(facts.placeholder) <= width), look.names[-1])
    lines = _lines(facts.placeholder, size, width, INK, NAME_LINES)
    lines += _lines(f"{facts.class_noun or 'no class noun'}, {facts.kind}", look.text, width, INK)
    if facts.fault:
        return [*lines, *_lines("cannot be read", look.text, width, ALARM)]
    lines += _lines(f"{facts.way}; {facts.stores}", look.text, width, QUIET)
    lines += _lines(f"{facts.steps} steps, {facts.bytes / 1000:,.0f} kB", look.text, width, QUIET, 1)
    nearest, red = found.nearest(facts.name), found.partners(facts.name)
    if nearest is not None:
        lines += _lines(f"most like <{nearest.name}> ({nearest.measure} {nearest.cosine:.2f})", look.text, width, QUIET, NAME_LINES + 1)
    if red:
        lines += _lines(f"collides with {listed(red)}", look.text, width, ALARM, NAME_LINES)
    return lines


def _height(lines: Sequence[Line]) -> int:
    return sum(round(1.35 * size) for _, size, _ in lines)


def _card(image: Image.Image, draw: ImageDraw.ImageDraw, place: tuple[int, int, int, int], facts: Facts, lines: Sequence[Line],
          side: int, red: bool) -> None:
    """place: left, top, width, height."""
    x, y, width, height = place
    draw.rectangle([x, y, x + width - 1, y + height - 1], ALARM_PAPER if red else (255, 255, 255), ALARM if red else GRID, 2 if red else 1)
    x, y = x + PAD, y + PAD
    draw.rectangle([x, y, x + side - 1, y + side - 1], GRID)
    picture = opened(facts.thumbnail)
    if picture is not None:
        image.paste(ImageOps.fit(picture, (side, side), Image.LANCZOS), (x, y))
    else:
        draw.text((x + side / 2, y + side / 2), "no thumbnail", QUIET, font(11), anchor="mm")
    x += side + PAD
    for text, size, colour in lines:
        draw.text((x, y), text, colour, font(size))
        y += round(1.35 * size)


def _heading(found: Inspection, shown: int, width: int) -> list[Line]:
    """Counts, then what is wrong."""
    count = len(found.facts)
    text = f"{count} concept{'' if count == 1 else 's'}, {sum(facts.bytes for facts in found.facts) / 1e6:.2f} MB"
    text += f"; {shown} are shown, those that collide first" if shown < count else ""
    lines = [(text if count else "the bank is empty", 17, INK)]
    for warning in found.warnings[:3]:
        lines += _lines(warning, 13, width, ALARM)
    more = len(found.warnings) - 3
    return [*lines, (f"and {more} more; the text lists them all", 13, ALARM)] if more > 0 else lines


def _page(found: Inspection, look: CardStyle, cards: Sequence[tuple[Facts, list[Line]]], heading: list[Line], size: tuple[int, int],
          card: tuple[int, int]) -> Image.Image:
    """size: of the page; card: width and height of every card."""
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    y = GAP
    for text, letters, colour in heading:
        draw.text((GAP, y), text, colour, font(letters))
        y += round(1.35 * letters)
    for i, (facts, lines) in enumerate(cards):
        place = (GAP + (i % look.columns) * (card[0] + GAP), y + GAP + (i // look.columns) * (card[1] + GAP), *card)
        _card(image, draw, place, facts, lines, look.side, bool(facts.fault or found.partners(facts.name)))
    return image


def bank_pages(found: Inspection) -> list[Image.Image]:
    """One picture, or several of one size where there are many concepts. All are in it up to some hundred; of more, those that collide come
    first and the rest is left out."""
    look = LARGE if len(found.facts) <= MANY else SMALL
    columns = max(1, min(look.columns, len(found.facts)))
    width = (WIDTH - (look.columns + 1) * GAP) // look.columns
    beside = width - look.side - 3 * PAD
    cards = [(facts, _said(facts, found, look, beside)) for facts in found.facts]
    height = max([look.side, *(_height(lines) for _, lines in cards)]) + 2 * PAD
    heading = _heading(found, len(cards), WIDTH - 2 * GAP)
    rows = max(1, (HEIGHT - _height(heading) - 2 * GAP) // (height + GAP))
    if len(cards) > PAGES * rows * look.columns:
        cards.sort(key=lambda card: not (card[0].fault or found.partners(card[0].name)))      # stable: else in the bank's order
        cards = cards[: PAGES * rows * look.columns]
        heading = _heading(found, len(cards), WIDTH - 2 * GAP)
    rows = max(1, min(rows, -(-len(cards) // columns)))
    wide = WIDTH if len(found.facts) >= look.columns or found.warnings else columns * (width + GAP) + GAP
    size = (max(wide, 420), 2 * GAP + _height(heading) + rows * (height + GAP) if cards else 60)
    parts = [cards[i : i + rows * columns] for i in range(0, len(cards), rows * columns)] or [[]]
    return [_page(found, look, part, heading, size, (width, height)) for part in parts]

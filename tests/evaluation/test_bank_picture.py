"""The picture of a bank: everything is in it, nothing runs into anything else, and it stays of a size that
can be looked at."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from PIL import Image

from continual_concepts.core.bank.terms import Terms
from continual_concepts.core.evaluation import bank_picture
from continual_concepts.core.evaluation.bank_picture import HEIGHT, MANY, PAGES, WIDTH, bank_pages, wrapped
from continual_concepts.core.evaluation.collisions import Collision
from continual_concepts.core.evaluation.inspection import Facts, Inspection
from continual_concepts.core.images import LARGEST_THUMBNAIL, font, opened

LONG = "W" * 64


def thumbnail(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (90, 60), (shade, 200, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def facts(name, **other) -> Facts:
    known = {"placeholder": f"<{name}>", "class_noun": "dog", "kind": "object", "method": "lora_m",
             "composes": "summed", "words": 2,
             "photos": 5, "steps": 300, "date": "2026-01-01", "stores": "rank 4", "copies": 1,
             "nbytes": 55_000, "thumbnail": thumbnail(40)}
    return Facts(name, **(known | other))


def inspection(several, collisions=(), warnings=()) -> Inspection:
    g = torch.Generator().manual_seed(0)
    return Inspection(tuple(several),
                      {"deltas": torch.rand(len(several), len(several), generator=g).double()},
                      tuple(collisions),
                      tuple(warnings))


@pytest.fixture
def drawn(monkeypatch):
    """Boxes of everything that is drawn: the texts of a page, and its cards."""
    texts, cards = [], []
    real_text, real_card = bank_picture.ImageDraw.ImageDraw.text, bank_picture._card

    def text(self, place, what, *rest, **other):
        box = self.textbbox(place, what, font=next((one for one in rest if hasattr(one, "getlength")), None),
                            anchor=other.get("anchor"))
        texts.append((what, box))
        count = len(texts)
        real_text(self, place, what, *rest, **other)
        del texts[count:]      # old versions of Pillow draw the lines of a text one by one

    def card(image, draw, place, *rest):
        cards.append((image, place))
        real_card(image, draw, place, *rest)

    monkeypatch.setattr(bank_picture.ImageDraw.ImageDraw, "text", text)
    monkeypatch.setattr(bank_picture, "_card", card)
    return texts, cards


def overlap(one, other) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


HARD = [facts("rex"), facts(LONG), facts("mimi", class_noun="a word " * 90, thumbnail=b"no picture"),
        facts("x" * 64, fault="damaged"),
        facts("\u732b" * 64, method="m" * 200, class_noun="\ud800 half a letter\n\n", steps=10**12),
        facts("ink", class_noun="", thumbnail=b"")]


@pytest.mark.parametrize("count", [1, 2, 3, len(HARD), 40])
def test_nothing_overlaps_and_nothing_leaves_its_card(drawn, count):
    several = [*HARD, *(facts(f"c{i}") for i in range(40))][:count]
    found = inspection(several, [Collision(LONG, several[0].name, "photos", "why")] if count > 2 else [],
                       ["a warning " * 60] * 9)
    pages = bank_pages(found)
    texts, cards = drawn
    assert len(cards) == count
    for page in pages:
        assert page.size == pages[0].size and page.width <= WIDTH and page.height <= HEIGHT
    boxes = [(place[0], place[1], place[0] + place[2], place[1] + place[3]) for _, place in cards]
    for what, (left, top, right, bottom) in texts:
        assert left >= 0 and right <= pages[0].width and top >= 0 and bottom <= pages[0].height, what
        inside = [box for box in boxes if overlap(box, (left, top, right, bottom))]
        assert all(box[0] < left and right < box[2] and box[1] < top and bottom < box[3]
                   for box in inside), what
    per_page = len(texts) if len(pages) == 1 else 0
    for i, (one, a) in enumerate(texts[:per_page]):
        for other, b in texts[i + 1 : per_page]:
            assert not overlap(a, b), (one, other)


def test_a_name_is_never_cut(drawn):
    for count in (2, MANY + 1):
        drawn[0].clear()
        bank_pages(inspection([facts(LONG), *(facts(f"c{i}") for i in range(count - 1))]))
        texts = [what for what, _ in drawn[0]]
        assert "".join(texts[1 : texts.index("dog, object")]) == f"<{LONG}>"


def test_many_concepts_come_on_pages_of_one_size(drawn):
    pages = bank_pages(inspection([facts(f"concept{i}") for i in range(100)]))
    assert 1 < len(pages) <= PAGES and len({page.size for page in pages}) == 1 and len(drawn[1]) == 100


def test_of_a_thousand_those_that_collide_are_shown(drawn):
    several = [facts(f"c{i}", thumbnail=b"") for i in range(1000)]
    pages = bank_pages(inspection(several, [Collision("c990", "c999", "photos", "why")]))
    shown = [what for what, _ in drawn[0]]
    assert len(pages) == PAGES and "<c990>" in shown and "<c999>" in shown and "<c0>" in shown
    assert f"{len(drawn[1])} are shown" in shown[0]


def test_an_empty_bank_says_so(drawn):
    pages = bank_pages(Inspection((), {}, (), ()))
    assert len(pages) == 1 and drawn[0][0][0] == "the bank is empty"


def test_those_that_collide_are_red():
    pages = bank_pages(inspection([facts("rex"), facts("mimi"), facts("tom")],
                                  [Collision("rex", "mimi", "photos", "why")]))
    colours = {colour for _, colour in pages[0].getcolors(1 << 20)}
    assert bank_picture.ALARM in colours and bank_picture.ALARM_PAPER in colours
    calm = {colour
            for _, colour in bank_pages(inspection([facts("rex"), facts("mimi")]))[0].getcolors(1 << 20)}
    assert bank_picture.ALARM not in calm


@pytest.mark.parametrize("text", ["", "rex", "a b c", "the-very-long-name-of-my-cat", LONG, "one two " * 50])
def test_wrapped_texts_fit_and_lose_nothing_until_the_last_line(text):
    lines = wrapped(text, font(13), 120, 30)
    assert all(font(13).getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    short = wrapped(text, font(13), 120, 2)
    assert len(short) <= 2 and (short == lines or short[-1].endswith("..."))


def test_a_card_shows_the_licence_and_the_heading_the_base(drawn):
    licensed = facts("rex", terms=Terms("CC BY 4.0", "Ann"))
    bank_pages(replace(inspection([licensed, facts("mimi")]), made_on="SD1.5"))
    texts = [what for what, _ in drawn[0]]
    assert texts.count("licence CC BY 4.0, by Ann") == 1 and texts.count("made on SD1.5") == 1


def test_a_small_file_with_many_pixels_is_no_thumbnail(monkeypatch):
    """Pixels of a large picture are not even read."""
    def png(side):
        buffer = io.BytesIO()
        Image.new("1", (side, side)).save(buffer, "PNG")
        return buffer.getvalue()

    assert opened(png(LARGEST_THUMBNAIL)).mode == "RGB"
    huge = png(10_000)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("read"))
    assert len(huge) < 20_000 and opened(huge) is None and opened(b"<svg>") is None

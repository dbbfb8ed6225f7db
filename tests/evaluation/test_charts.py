"""Pictures that nodes show can be read: contrast of texts and lines, and size of texts at a node's width."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw

from continual_concepts.core import charts, images
from continual_concepts.core.data import contact_sheet as contact_sheets
from continual_concepts.core.data.pictures import pair_pictures
from continual_concepts.core.data.report import report_of
from continual_concepts.core.evaluation import bank_picture
from continual_concepts.core.evaluation.bank_picture import FEW, MANY, bank_pages
from continual_concepts.core.evaluation.bankcheck import PHOTOS, BankReport, Reference
from continual_concepts.core.evaluation.collisions import Collision
from continual_concepts.core.evaluation.inspection import Facts, Inspection
from continual_concepts.core.evaluation.sheet import sheet

WHITE = (255, 255, 255)
LOWEST = 4.5      # WCAG 2.2 for texts
SMALLEST = 10      # pixels
NAN = float("nan")


@pytest.mark.parametrize("paper", [images.PAPER, images.CARD_PAPER, images.ALARM_PAPER])
@pytest.mark.parametrize("ink", [images.INK, images.QUIET, images.ACCENT, images.ALARM, charts.SIMILAR,
                                 charts.RAW])
def test_texts_and_lines_differ_enough_from_their_paper(ink, paper):
    assert images.contrast(ink, paper) >= LOWEST


def test_contrast_is_that_of_the_standard():
    assert images.contrast((0, 0, 0), WHITE) == pytest.approx(21)
    assert images.contrast(WHITE, (119, 119, 119)) == pytest.approx(4.48, abs=0.01)      # a known grey


def test_labels_can_be_read_on_every_colour():
    shades = [images.colour(index) for index in range(40)] + [images.ACCENT, images.ALARM]
    assert min(images.contrast(images.ink_on(shade), shade) for shade in shades) >= LOWEST


def selection(sites: int):
    indices = {(site, projection): torch.arange(4) for site in range(sites)
               for projection in ("to_k", "to_v")}

    class Selected(SimpleNamespace):
        def __len__(self) -> int:
            return 12_345

        def mask(self, key) -> torch.Tensor:
            return torch.rand(32, 8, generator=torch.Generator().manual_seed(key[0])) > 0.7

    return Selected(indices=indices)


PICTURES = {
    "loss": lambda: charts.loss_picture([0.3, 0.2, 0.1] * 40, "loss of <rex>", [(10, 0.5), (100, 0.6)]),
    "weights": lambda: charts.weights_picture(["rex", "mimi"], torch.rand(16, 2), "weights, sharp, 1"),
    "regions": lambda: charts.regions_picture(torch.ones(4, 8, 8), torch.rand(4, 8, 8), ["a dog"] * 4),
    "thumbnails": lambda: charts.thumbnails_picture([("<rex>", b"")] * 8, columns=4),
    "neurons": lambda: charts.selection_picture(selection(16), 16, "neurons of 'a photo of a dog'", 0.0013),
    "note": lambda: charts.note_picture("No regions were used, so there is no attention of regions to show."),
}


def commonest(picture: Image.Image) -> images.Colour:
    return max(picture.getcolors(picture.width * picture.height))[1]


def jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (shade, 200, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def bank_of(count: int) -> Image.Image:
    """Cards of a bank: two concepts that collide, one that cannot be read, one without a thumbnail."""
    facts = [Facts(f"c{i}", f"<c{i}>", "dog", "object", "slots", "summed", 2, 5, 300, "2026-01-01", "8 slots",
                   1, 55_000, jpeg(40 * i % 256) if i != 3 else b"", fault="damaged" if i == 2 else "")
             for i in range(count)]
    likeness = {"deltas": torch.rand(count, count, generator=torch.Generator().manual_seed(0)).double()}
    return bank_pages(Inspection(tuple(facts), likeness, (Collision("c0", "c1", "photos", "why"),),
                                 ("two concepts may be one",)))[0]


def photos() -> Image.Image:
    """A contact sheet: two equal photos, captions, masks."""
    g = torch.Generator().manual_seed(0)
    pixels = [torch.rand(3, 48, 64, generator=g) * 2 - 1 for _ in range(3)]
    masks = [(torch.arange(64) < 32).float().expand(1, 48, 64)] * 4
    pictures = pair_pictures([*pixels, pixels[0]], ["a dog", "", "b", ""], masks)
    return contact_sheets.contact_sheet(report_of(pictures).checked())


def evaluation() -> Image.Image:
    g = torch.Generator().manual_seed(0)
    names = ("rex", "mimi", "tom")
    pictures = {name: torch.rand(4, 3, 32, 32, generator=g) * 2 - 1 for name in names}
    references = {name: Reference(tuple(pictures[name][:2]), PHOTOS) for name in names}
    confusion = torch.tensor([[0.9, 0.5, 0.2], [0.95, 0.6, 0.3], [0.4, 0.7, 0.8]])
    return sheet(BankReport(references, pictures, confusion, 0.01))


FEW_CARDS = {"cards": lambda: bank_of(FEW), "photos": photos}
CARDS = FEW_CARDS | {"large cards": lambda: bank_of(FEW + 1), "small cards": lambda: bank_of(MANY + 1),
                     "evaluation": evaluation}


@pytest.mark.parametrize("name", [*PICTURES, *CARDS])
def test_every_text_differs_enough_from_what_is_below_it(name, monkeypatch):
    """Also where it stands on a mark, on a cell of a heat map or beside a thumbnail."""
    low, draw = [], ImageDraw.ImageDraw.text

    def checked(self, place, text, fill, font, anchor=None, **more):
        box = [round(side) for side in self.textbbox(place, text, font=font, anchor=anchor)]
        below = commonest(self._image.crop(box))
        if text.strip() and images.contrast(fill, below) < LOWEST:
            low.append((text, fill, below))
        draw(self, place, text, fill, font, anchor, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", checked)
    picture = (PICTURES | CARDS)[name]()
    assert not low
    dark = (images.PAPER, images.CARD_PAPER, images.ALARM_PAPER, images.GRID)
    assert commonest(picture) in dark


@pytest.mark.parametrize("name", [*PICTURES, *FEW_CARDS])
def test_texts_can_be_read_at_the_width_of_a_node(name, monkeypatch):
    sizes = []

    def recorded(size: int):
        sizes.append(size)
        return images.font(size)

    for module in (charts, contact_sheets, bank_picture):
        monkeypatch.setattr(module, "font", recorded)
    picture = (PICTURES | FEW_CARDS)[name]()
    assert min(sizes) * min(1.0, charts.NODE / picture.width) >= SMALLEST
    assert len(picture.getcolors(picture.width * picture.height)) > 2      # nothing is an empty panel


@pytest.mark.parametrize("scores", [[(1, NAN)], [(1, NAN), (2, 0.5), (3, 0.6)], [(1, 0.5), (2, NAN)]])
def test_scores_of_broken_previews_are_left_out(scores):
    """An overflow in a preview must not cost the concept that was learned."""
    known = [(step, score) for step, score in scores if score == score]
    drawn = charts.loss_picture([0.3, 0.2, 0.1], "loss", scores, spreads=dict(scores))
    expected = charts.loss_picture([0.3, 0.2, 0.1], "loss", known, spreads=dict(known))
    assert drawn.tobytes() == expected.tobytes()

"""Pictures that nodes show can be read: contrast of texts and lines, and size of texts at a node's width."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from continual_concepts.core import charts, images

WHITE = (255, 255, 255)
LOWEST = 4.5      # WCAG 2.2 for texts
SMALLEST = 10      # pixels


@pytest.mark.parametrize("paper", [images.PAPER, WHITE, images.ALARM_PAPER])
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


@pytest.mark.parametrize("name", PICTURES)
def test_texts_can_be_read_at_the_width_of_a_node(name, monkeypatch):
    sizes = []

    def recorded(size: int):
        sizes.append(size)
        return images.font(size)

    monkeypatch.setattr(charts, "font", recorded)
    picture = PICTURES[name]()
    assert min(sizes) * min(1.0, charts.NODE / picture.width) >= SMALLEST
    assert len(picture.getcolors(1 << 24)) > 2      # nothing is an empty panel

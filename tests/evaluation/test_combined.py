"""How well each concept of a picture of several is shown: against brute force, and on scores made by hand."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from continual_concepts.core.evaluation.combined import assign_strips, strip, strip_scores


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("width", "count"), [(12, 2), (12, 3), (10, 3), (7, 2), (5, 5)])
def test_strips_tile_the_picture(width, count):
    pictures, seen = torch.arange(width).float().expand(2, 3, 4, width), []
    for i in range(count):
        cut = strip(pictures, i, count)
        assert cut.shape == pictures.shape
        columns = cut[0, 0, 0].int().tolist()
        assert columns == sorted(columns)
        seen += sorted(set(columns))
    assert seen == list(range(width))      # every column in exactly one strip


def test_a_strip_stays_in_place_and_its_border_is_repeated():
    columns = strip(torch.arange(12).float().expand(1, 3, 2, 12), 1, 3)[0, 0, 0].int().tolist()
    assert columns == [4, 4, 4, 4, 4, 5, 6, 7, 7, 7, 7, 7]


def test_the_only_strip_is_the_picture():
    pictures = draw(2, 3, 4, 6)
    assert torch.equal(strip(pictures, 0, 1), pictures)


def test_every_strip_is_scored_for_every_concept():
    pictures, weights = draw(2, 3, 4, 6), draw(3, 2, seed=1)

    def score(images):
        return images.mean((2, 3)) @ weights

    found = strip_scores(pictures, 2, score)
    assert found.shape == (2, 2, 2)
    for s in range(2):
        assert torch.allclose(found[:, s], score(strip(pictures, s, 2)))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_best_assignment_is_that_of_brute_force(count):
    scores = draw(20, count, count, seed=count)
    found = assign_strips(scores)
    for b, own in enumerate(scores.tolist()):
        best = max(permutations(range(count)), key=lambda way: sum(own[way[c]][c] for c in range(count)))
        for c in range(count):
            row = own[best[c]]
            assert found.alignment[b, c] == pytest.approx(row[c])
            assert bool(found.confused[b, c]) == (max(row) > row[c])
            assert found.bleed[b, c].tolist() == pytest.approx(row)


def test_both_in_either_order_are_found():
    found = assign_strips(torch.tensor([[[0.9, 0.2], [0.1, 0.8]], [[0.2, 0.8], [0.9, 0.1]]]))
    assert not found.confused.any()
    assert torch.allclose(found.alignment, torch.tensor([[0.9, 0.8], [0.9, 0.8]]))


def test_one_individual_twice_confuses_the_other():
    found = assign_strips(torch.tensor([[[0.9, 0.3], [0.8, 0.3]]]))
    assert found.confused.tolist() == [[False, True]]
    assert torch.allclose(found.bleed, torch.tensor([[[0.9, 0.3], [0.8, 0.3]]]))

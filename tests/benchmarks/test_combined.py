"""Which concepts are present in a picture of several: against brute force, and on scores made by hand."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from continual_concepts.benchmarks.continual.combined import assign_strips, similarities, strip


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


def test_similarities_compare_every_strip_with_every_concept():
    pictures, references = draw(2, 3, 4, 6), [draw(5, 3, seed=1), draw(2, 3, seed=2)]

    def features(images):
        return images.mean((2, 3))

    found = similarities(pictures, references, features)
    assert found.shape == (2, 2, 2)
    for b in range(2):
        for s in range(2):
            for c, own in enumerate(references):
                expected = (own @ features(strip(pictures, s, 2))[b]).mean()
                assert found[b, s, c] == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_best_assignment_is_that_of_brute_force(count):
    scores, levels = draw(20, count, count, seed=count), [0.3] * count
    found = assign_strips(scores, levels)
    for b, own in enumerate(scores.tolist()):
        best = max(permutations(range(count)), key=lambda way: sum(own[way[c]][c] for c in range(count)))
        for c in range(count):
            row = own[best[c]]
            assert found.alignment[b, c] == pytest.approx(row[c])
            assert bool(found.confused[b, c]) == (max(row) > row[c])
            assert bool(found.present[b, c]) == (max(row) == row[c] and row[c] > 0.3)


def test_both_in_either_order_are_there():
    found = assign_strips(torch.tensor([[[0.9, 0.2], [0.1, 0.8]], [[0.2, 0.8], [0.9, 0.1]]]), [0.5, 0.5])
    assert found.present.all() and not found.confused.any()
    assert torch.allclose(found.alignment, torch.tensor([[0.9, 0.8], [0.9, 0.8]]))


def test_one_individual_twice_confuses_the_other():
    found = assign_strips(torch.tensor([[[0.9, 0.3], [0.8, 0.3]]]), [0.5, 0.2])
    assert found.confused.tolist() == [[False, True]] and found.present.tolist() == [[True, False]]


def test_below_its_level_a_concept_is_not_there_but_not_confused_either():
    found = assign_strips(torch.tensor([[[0.4, 0.1], [0.1, 0.8]]]), [0.5, 0.5])
    assert not found.confused.any() and found.present.tolist() == [[False, True]]


def test_each_concept_has_its_own_level():
    scores = torch.tensor([[[0.4, 0.1], [0.1, 0.4]]])
    assert assign_strips(scores, [0.3, 0.5]).present.tolist() == [[True, False]]
    assert assign_strips(scores, [0.5, 0.3]).present.tolist() == [[False, True]]

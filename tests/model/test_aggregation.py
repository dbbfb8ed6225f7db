"""Aggregation weights: pure functions."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.model.aggregation import (
    equal_weights,
    paper_weights,
    released_weights,
    sharp_weights,
)


def states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sharp_is_one_for_named_concepts_whatever_the_bank():
    for others in (0, 1, 50):
        names = ["rex", *(f"c{i}" for i in range(others))]
        weights = sharp_weights(names, ["rex"], 4)
        assert weights.shape == (4, 1 + others) and (weights[:, 0] == 1).all() and not weights[:, 1:].any()


@pytest.mark.parametrize("count", [1, 2, 7])
def test_equal_sums_to_one(count):
    assert torch.allclose(equal_weights(count, 3), torch.full((3, count), 1 / count))
    assert equal_weights(0, 3).shape == (3, 0)


def test_paper_is_equation_3():
    prompt, concepts = states(2, 9, 6), states(2, 4, 6, seed=1)
    for layer in range(2):
        relation = torch.tensor([max(float(c @ e) for c in prompt[layer]) for e in concepts[layer]])
        expected = relation**2 / (relation**2).norm()
        assert torch.allclose(paper_weights(prompt, concepts)[layer], expected, atol=1e-6)


def test_paper_gives_a_single_concept_weight_one():
    assert torch.allclose(paper_weights(states(3, 9, 6), states(3, 1, 6, seed=1)), torch.ones(3, 1))


def test_released_by_loops():
    prompt, words, counts = states(9, 6), states(5, 6, seed=1), [2, 3]
    best = [max(float(torch.cosine_similarity(c, w, dim=0)) for c in prompt) for w in words]
    relation = torch.tensor([sum(best[:2]) / 2, sum(best[2:]) / 3])
    assert torch.allclose(released_weights(prompt, words, counts), relation**4 / (relation**4).sum(),
                          atol=1e-6)


@pytest.mark.parametrize("counts", [[1], [2, 2], [1, 2, 3]])
def test_released_sums_to_one_and_sees_no_length(counts):
    prompt, words = states(2, 9, 6), states(2, sum(counts), 6, seed=1)
    weights = released_weights(prompt, words, counts)
    assert torch.allclose(weights.sum(-1), torch.ones(2))
    assert torch.allclose(released_weights(prompt * 3, words * 0.1, counts), weights, atol=1e-6)


@pytest.mark.parametrize("function",
                         [lambda p, w: paper_weights(p, w),
                          lambda p, w: released_weights(p, w, [1] * w.shape[-2])])
def test_the_concept_in_the_prompt_weighs_most(function):
    concepts = torch.nn.functional.normalize(states(4, 6), dim=-1)
    prompt = torch.cat([states(3, 6, seed=2) * 0.1, concepts[2:3]])
    assert function(prompt, concepts).argmax() == 2


def test_nothing_to_relate_gives_zeros_rather_than_nan():
    assert not paper_weights(torch.zeros(3, 6), torch.zeros(2, 6)).any()
    assert not released_weights(torch.zeros(3, 6), torch.zeros(2, 6), [1, 1]).any()

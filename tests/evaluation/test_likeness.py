"""Likeness of concepts: what comes from factors and common places is what dense matrices would give."""

from __future__ import annotations

import math

import pytest
import torch

from continual_concepts.core.bank.tokens import TokenGroup
from continual_concepts.core.evaluation import likeness
from continual_concepts.core.evaluation.likeness import delta_cosines, word_cosines
from continual_concepts.core.model.deltas import LowRankDelta, SparseDelta

SHAPES = {(0, "to_k"): (6, 5), (0, "to_q"): (6, 6), (1, "to_k"): (8, 5)}


def low_rank(seed, rank=2, keys=tuple(SHAPES), dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {key: LowRankDelta(torch.randn(a, rank, generator=g).to(dtype),
                              torch.randn(rank, b, generator=g).to(dtype), 0.5 + seed)
            for key, (a, b) in SHAPES.items() if key in keys}


def sparse(seed, count=9, keys=tuple(SHAPES)):
    g = torch.Generator().manual_seed(seed)
    return {key: SparseDelta(SHAPES[key], torch.randperm(math.prod(SHAPES[key]), generator=g)[:count].int(),
                             torch.randn(count, generator=g), 2.0) for key in keys}


def flat(deltas):
    return torch.cat([(deltas[key].dense() if key in deltas else torch.zeros(shape)).flatten()
                      for key, shape in SHAPES.items()]).double()


def dense_cosines(left, right):
    return torch.tensor([[float(torch.nn.functional.cosine_similarity(flat(a), flat(b), dim=0))
                          for b in right] for a in left]).double()


@pytest.mark.parametrize("make", [low_rank, sparse])
@pytest.mark.parametrize("chunk", [1, likeness.CHUNK])
def test_cosines_are_those_of_the_dense_matrices(make, chunk, monkeypatch):
    monkeypatch.setattr(likeness, "CHUNK", chunk)
    left, right = [make(1), make(2, keys=((0, "to_k"),))], [make(3), make(1), make(4, 3)]
    assert torch.allclose(delta_cosines(left, right), dense_cosines(left, right), atol=1e-6)
    assert torch.allclose(delta_cosines(right, right).diagonal(), torch.ones(3, dtype=torch.float64))


def test_ranks_and_types_may_differ():
    several = [low_rank(1), low_rank(2, rank=4), low_rank(3, rank=1, dtype=torch.float16)]
    assert torch.allclose(delta_cosines(several, several), dense_cosines(several, several), atol=1e-6)


def test_the_sign_and_size_of_a_delta_do_what_they_do_to_a_cosine():
    one = low_rank(1)
    opposite, half = ({key: delta.scaled(weight) for key, delta in one.items()} for weight in (-1.0, 0.5))
    assert torch.allclose(delta_cosines([one], [opposite, half]), torch.tensor([[-1.0, 1.0]]).double())


def test_what_cannot_be_compared_is_not_a_number():
    none, mixed = {}, {**low_rank(1), (0, "to_q"): sparse(1)[0, "to_q"]}
    apart = low_rank(4, keys=((0, "to_k"),)), sparse(5, keys=((1, "to_k"),))
    cosines = delta_cosines([low_rank(1), sparse(2), none], [low_rank(3), sparse(3), none, mixed])
    assert cosines[0, 1].isnan() and cosines[1, 0].isnan() and cosines[2].isnan().all()
    assert cosines[:, 2].isnan().all()
    assert cosines[0, 3].isnan() and cosines[1, 3].isnan() and cosines[0, 0].isfinite()
    assert cosines[1, 1].isfinite()
    assert delta_cosines([apart[0]], [apart[1]]) == 0      # no projection in common


def test_zero_deltas_have_no_direction_and_huge_ones_do():
    zero = {key: LowRankDelta(torch.zeros_like(d.up), d.down) for key, d in low_rank(1).items()}
    huge = {key: LowRankDelta(d.up * 1e30, d.down * 1e30) for key, d in low_rank(1).items()}
    empty = {key: SparseDelta(shape, torch.zeros(0, dtype=torch.int32), torch.zeros(0))
             for key, shape in SHAPES.items()}
    assert delta_cosines([zero], [low_rank(1)]).isnan() and delta_cosines([empty], [sparse(1)]).isnan()
    assert delta_cosines([empty], [empty]).isnan()
    assert torch.allclose(delta_cosines([huge], [huge]), torch.ones(1, 1).double())
    assert torch.allclose(delta_cosines([huge], [low_rank(1)]), torch.ones(1, 1).double())


def group(seed, words=2, copies=3):
    g = torch.Generator().manual_seed(seed)
    vectors = {"clip_l": torch.randn(copies, words, 4, generator=g),
               "clip_g": torch.randn(copies, words, 3, generator=g)}
    return TokenGroup(tuple(f"w{i}" for i in range(words)), vectors)


def test_words_are_compared_copy_by_copy():
    groups = [group(1), group(2, words=1, copies=1), group(3, words=3)]
    found = word_cosines(groups, groups)
    assert torch.allclose(found.diagonal(), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(found, found.T)
    by_hand = [torch.nn.functional.cosine_similarity(groups[0].vectors[e].mean(1),
                                                     groups[1].vectors[e].mean(1)).mean()
               for e in ("clip_l", "clip_g")]
    assert float(found[0, 1]) == pytest.approx(float(sum(by_hand) / 2), abs=1e-6)

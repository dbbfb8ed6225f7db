"""Metrics against their definitions in plain loops, and what must hold for any features."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.evaluation import metrics


def features(count, width=6, seed=0):
    return metrics.unit(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)))


def mmd_by_loops(one, other):
    """KID's convention: (x . y / D + 1)^3; a set's own pairs without the pairs of one with itself."""
    width = one.shape[1]

    def kernel(x, y):
        return (sum(a * b for a, b in zip(x, y, strict=True)) / width + 1) ** 3

    one, other = one.double().tolist(), other.double().tolist()
    own = [sum(kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s)
               if i != j) / (len(s) * (len(s) - 1)) for s in (one, other)]
    return sum(own) - 2 * sum(kernel(x, y) for x in one for y in other) / (len(one) * len(other))


@pytest.mark.parametrize(("m", "n"), [(2, 2), (3, 7), (10, 4)])
def test_mmd_is_that_of_the_loops(m, n):
    one, other = features(m), 3 * features(n, seed=1)
    assert metrics.mmd(one, other) == pytest.approx(mmd_by_loops(one, other), abs=1e-12)


def test_mmd_by_hand():
    """One coordinate: kernel (x y + 1)^3; own pairs of (1, 0) give 1, of (1, 1) give 8; across 8, 8, 1, 1."""
    first, second = torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [1.0]])
    assert metrics.mmd(first, second) == pytest.approx(1 + 8 - 2 * 4.5)


def test_mmd_is_symmetric_unbiased_and_grows_with_the_distance():
    one, other = features(8), features(9, seed=1)
    assert metrics.mmd(one, other) == pytest.approx(metrics.mmd(other, one))
    same = [metrics.mmd(features(5, seed=2 * s), features(5, seed=2 * s + 1)) for s in range(300)]
    mean = torch.tensor(same).mean()
    assert abs(mean) < 3 * torch.tensor(same).std() / 300**0.5
    assert min(same) < 0      # a biased estimate is never negative
    near, far = (metrics.mmd(one, metrics.unit(other + shift)) for shift in (0.5, 5.0))
    assert near < far


def test_a_mmd_is_the_mean_over_all_concepts():
    real, final = [features(4, seed=s) for s in range(3)], [features(5, seed=10 + s) for s in range(3)]
    each = [metrics.mmd(r, f) for r, f in zip(real, final, strict=True)]
    assert metrics.a_mmd(real, final) == pytest.approx(sum(each) / 3)
    with pytest.raises(ValueError):
        metrics.a_mmd(real, final[:2])


def test_f_mmd_leaves_the_last_concept_out():
    first, final = [features(4, seed=s) for s in range(3)], [features(5, seed=10 + s) for s in range(3)]
    expected = (metrics.mmd(first[0], final[0]) + metrics.mmd(first[1], final[1])) / 2
    assert metrics.f_mmd(first, final) == pytest.approx(expected)
    assert metrics.f_mmd(first, [*final[:2], features(5, seed=99)]) == pytest.approx(expected)
    assert metrics.f_mmd(first[:1], final[:1]) == 0


def test_a_method_that_forgets_nothing_has_rate_zero_and_one_that_does_has_its_mean_drop():
    assert metrics.task_forgetting_rate([[0.8], [0.8, 0.7], [0.8, 0.7, 0.9]]) == 0
    rate = metrics.task_forgetting_rate([[0.8], [0.9, 0.7], [0.6, 0.6, 0.9]])
    assert rate == pytest.approx((0.2 + 0.1) / 2)
    assert metrics.task_forgetting_rate([[0.8], [0.9, 0.7]]) < 0      # getting better is no forgetting
    assert metrics.task_forgetting_rate([[0.8]]) == 0


def test_bleed_has_own_pictures_on_its_diagonal():
    own, references = [features(3, seed=s) for s in range(3)], [features(4, seed=10 + s) for s in range(3)]
    found = metrics.confusion(own, references)
    assert found.shape == (3, 3)
    for i in range(3):
        for j in range(3):
            assert float(found[i, j]) == pytest.approx(metrics.image_alignment(own[i], references[j]),
                                                       abs=1e-6)


def test_drift_is_a_share_of_the_full_range():
    pictures = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert metrics.base_change(pictures, pictures) == 0
    assert metrics.base_change(torch.full_like(pictures, -1), torch.ones_like(pictures)) == pytest.approx(1)
    assert metrics.base_change(pictures, pictures + 0.1) == pytest.approx(0.05, abs=1e-6)
    half = pictures.clone()
    half[0] += 0.2
    expected = pytest.approx(0.1 / 2**0.5, abs=1e-6)
    assert metrics.base_change(pictures, half) == expected == metrics.base_change(half, pictures)

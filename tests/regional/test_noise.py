"""Region noise estimation by its formulas."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.errors import ConceptError
from continual_concepts.core.regional.noise import region_noise, scene_is_seen
from continual_concepts.core.regional.regions import box_mask

LEFT, RIGHT = (0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def noises():
    masks = torch.stack([box_mask(LEFT, 6, 6), box_mask((0, 0.25, 1, 1), 6, 6)])
    return random(2, 4, 6, 6), random(2, 2, 4, 6, 6, seed=1), masks



def test_region_noise_by_its_formulas(noises):
    scene, regions, masks = noises
    count = masks.sum(0)
    mean = (regions * masks[:, None, None]).sum(0) / count.clamp(min=1)
    expected = torch.where(count > 0, 0.1 * scene + 0.9 * mean, scene)
    assert torch.allclose(region_noise(scene, regions, masks), expected, atol=1e-6)
    literal = 0.1 * scene + sum(0.9 * regions[u] * masks[u] for u in range(2))
    assert torch.allclose(region_noise(scene, regions, masks, outside="literal"), literal, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_region_noise_at_its_ends(noises, alpha):
    scene, regions, _ = noises
    assert torch.equal(region_noise(scene, regions[:0], torch.zeros(0, 6, 6), alpha), scene)
    assert torch.equal(region_noise(scene, regions, torch.zeros(2, 6, 6), alpha), scene)
    one = region_noise(scene, regions[:1], torch.ones(1, 6, 6), alpha)
    assert torch.allclose(one, alpha * scene + (1 - alpha) * regions[0], atol=1e-6)
    with pytest.raises(ConceptError, match="keep, literal"):
        region_noise(scene, regions, torch.zeros(2, 6, 6), alpha, "away")


def test_the_scene_is_seen_where_no_region_is():
    halves = torch.stack([box_mask(LEFT, 4, 4), box_mask(RIGHT, 4, 4)])
    assert not scene_is_seen(halves) and scene_is_seen(halves[:1]) and scene_is_seen(0.5 * halves)
    assert scene_is_seen(0.5 * halves, "priority")

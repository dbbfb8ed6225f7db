"""Regions: boxes, masks, grids, shares and covers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from continual_concepts.core.errors import ConceptError
from continual_concepts.core.model.sites import grid_of
from continual_concepts.core.regional.cover import cover_of
from continual_concepts.core.regional.regions import (
    OVERLAPS,
    Region,
    box_mask,
    masks_of,
    pooled_of,
    region_mask,
    shares,
)
from continual_concepts.core.sampling.settings import SampleSettings

FULL = (0.0, 0.0, 1.0, 1.0)
LEFT, RIGHT = (0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)
QUICK = SampleSettings(steps=3, cfg=3.0, size=(32, 32))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("box", [(0.0, 0.0, 0.05, 0.05), (0.95, 0.4, 1.0, 0.45), (0.49, 0.49, 0.51, 0.51),
                                 FULL])
def test_small_boxes_survive_on_every_grid(box, size):
    mask = box_mask(box, size, size)
    assert mask.any() and set(mask.flatten().tolist()) <= {0.0, 1.0}
    top, left, bottom, right = box
    rows, columns = mask.nonzero().T
    assert rows.min() >= int(top * size)
    assert rows.max() < max(bottom * size, 1 + int((top + bottom) / 2 * size))
    assert columns.min() >= int(left * size)
    assert columns.max() < max(right * size, 1 + int((left + right) / 2 * size))


def test_boxes_take_whole_cells_despite_rounding():
    assert box_mask((0.3, 0.1, 0.6, 0.7), 10, 10).sum() == 3 * 6
    assert torch.equal(box_mask(LEFT, 4, 8) + box_mask(RIGHT, 4, 8), torch.ones(4, 8))


def test_masks_are_reduced_by_area():
    mask = torch.zeros(8, 8)
    mask[:, :3] = 1
    assert torch.equal(region_mask(Region("x", mask=mask), 2, 4)[0], torch.tensor([1.0, 0.5, 0.0, 0.0]))
    assert torch.equal(masks_of([Region("x", LEFT, strength=0.5)], 2, 2), torch.tensor([[[0.5, 0.0]] * 2]))


GRIDS = [((8, 8), (8, 8)), ((8, 8), (2, 2)), ((9, 13), (5, 7)), ((9, 13), (3, 4)), ((96, 64), (12, 8))]


@pytest.mark.parametrize(("latent", "grid"), GRIDS)
def test_grids_follow_from_the_number_of_cells(latent, grid):
    assert grid_of(grid[0] * grid[1], *latent) == grid


@pytest.mark.parametrize("cells", [0, 5, 1000])
def test_impossible_grids_are_refused(cells):
    with pytest.raises(ConceptError):
        grid_of(cells, 8, 8)


def test_shares_sum_to_one():
    masks = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(0))
    regions, scene = shares(masks)
    assert torch.allclose(regions.sum(0) + scene, torch.ones(5, 5))
    regions, scene = shares(torch.ones(3, 2, 2))
    assert torch.allclose(regions, torch.full((3, 2, 2), 1 / 3)) and not scene.any()


@pytest.mark.parametrize("fields", [
    {}, {"box": FULL, "mask": torch.ones(2, 2)}, {"box": (0.5, 0, 0.5, 1)}, {"box": (0, 0, 1, 1.1)},
    {"box": FULL, "strength": 2},
    {"box": FULL, "start": 0.5, "end": 0.4}, {"box": (float("nan"), 0, 1, 1)},
])
def test_bad_regions_are_refused(fields):
    with pytest.raises(ConceptError, match="region 'a dog'"):
        Region("a dog", **fields)


def test_pooled_text_is_the_mean_by_area():
    scene, own = torch.zeros(2, 4), [torch.ones(2, 4), 2 * torch.ones(2, 4)]
    assert torch.equal(pooled_of([Region("a", FULL)], scene, own[:1], (8, 8), "average"), own[0])
    half = pooled_of([Region("a", LEFT, strength=0.5), Region("b", RIGHT, start=0.5)], scene, own, (8, 8),
                     "average")
    assert torch.allclose(half, torch.full((2, 4), 0.25 * 1 + 0.25 * 2))
    assert torch.equal(pooled_of([Region("a", LEFT, strength=0.0)], own[0], own[1:], (8, 8), "average"),
                       own[0])


def test_the_first_region_lies_on_top_and_the_nearest_keeps_its_place():
    large, small = box_mask(FULL, 8, 8), box_mask((0.25, 0.25, 0.75, 0.75), 8, 8)
    masks = torch.stack([large, small])
    own, scene = shares(masks, "priority")
    assert torch.equal(own[0], large) and not own[1].any() and not scene.any()
    own, _ = shares(masks.flip(0), "priority")
    assert torch.equal(own[0], small) and torch.equal(own[1], large - small)
    own, scene = shares(masks, "nearest")
    # The same centre: the smaller one
    assert torch.equal(own[1], small) and torch.equal(own[0], large - small) and not scene.any()
    left, right = box_mask((0, 0, 1, 0.75), 8, 8), box_mask((0, 0.25, 1, 1), 8, 8)
    own, _ = shares(torch.stack([left, right]), "nearest")
    assert torch.equal(own[0], box_mask(LEFT, 8, 8)) and torch.equal(own[1], box_mask(RIGHT, 8, 8))
    with pytest.raises(ConceptError, match="average, priority, nearest"):
        shares(masks, "sum")


@pytest.mark.parametrize("overlap", OVERLAPS)
@given(data=st.data())
def test_shares_sum_to_one_and_stay_where_the_masks_are(overlap, data):
    seed, count = data.draw(st.integers(0, 1000)), data.draw(st.integers(1, 5))
    masks = torch.rand(count, 5, 7, generator=torch.Generator().manual_seed(seed))
    masks = masks * (torch.rand(count, 5, 7, generator=torch.Generator().manual_seed(seed + 1)) < 0.5)
    own, scene = shares(masks, overlap)
    assert torch.allclose(own.sum(0) + scene, torch.ones(5, 7), atol=1e-6)
    assert own.min() >= 0 and scene.min() >= 0 and not own[masks == 0].any()


@given(seed=st.integers(0, 1000), count=st.integers(1, 6))
def test_a_cover_gives_every_cell_its_sources(seed, count):
    """Put together by the cover, marks of regions and cells come to their own cells with their own
    weights."""
    masks = torch.rand(count, 20, generator=torch.Generator().manual_seed(seed))
    masks = masks * (torch.rand(count, 20, generator=torch.Generator().manual_seed(seed + 1)) < 0.4)
    own, scene = shares(masks)
    cover = cover_of(own, scene)
    marks = torch.cat([(100.0 * torch.tensor(g.members).view(-1, 1) + g.cells).flatten()
                       for g in cover.groups] or [torch.zeros(1)])
    for cell in range(20):
        found = {float(marks[place]): float(weight)
                 for place, weight in zip(cover.sources[cell], cover.weights[0, cell], strict=True)
                 if weight > 0}
        assert found == pytest.approx({100.0 * u + cell: float(own[u, cell])
                                       for u in range(count) if own[u, cell] > 0})
    assert torch.equal(cover.scene[0], scene)
    assert sorted(u for g in cover.groups for u in g.members) == [u for u in range(count) if own[u].any()]

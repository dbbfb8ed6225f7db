"""Attention maps of regions: every region's own attention to its words, at every cell."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.benchmarks.cost.synthetic import Operations, context_of
from continual_concepts.benchmarks.regional import cost as regional_cost
from continual_concepts.core.regional import observe
from continual_concepts.core.regional.observe import ObservedRegions
from continual_concepts.core.regional.processor import Part
from continual_concepts.core.regional.regions import Region, masks_of, shares

WORDS = (3, 4)


@pytest.fixture
def observed(tiny_backbone, monkeypatch):
    monkeypatch.setattr("continual_concepts.benchmarks.cost.synthetic.WIDTH",
                        tiny_backbone.layout.sites[0].context_width)

    def build(is_word_bound, count=2):
        boxes = regional_cost.boxes_of(count)
        regions, parts, _ = regional_cost.parts_of(tiny_backbone.layout, boxes, is_word_bound)
        rows = torch.tensor([0, 0, 0, 1, 1, 1])
        processor = ObservedRegions(tiny_backbone, Part(context_of(2, 1, seed=1), {}), regions, parts, rows,
                                    (8, 8), tokens=[WORDS] * count)
        processor.is_observing = True
        return processor

    return build


@pytest.mark.parametrize("at_once", [1, 2**25])
@pytest.mark.parametrize("is_word_bound", [True, False])
@torch.no_grad()
def test_maps_are_each_regions_own_attention(tiny_backbone, observed, site_output, is_word_bound, at_once,
                                             monkeypatch):
    monkeypatch.setattr(observe, "AT_ONCE", at_once)      # picture by picture, or all together
    processor, site = observed(is_word_bound), tiny_backbone.layout.sites[2]
    x = torch.randn(6, 16, site.width, generator=torch.Generator().manual_seed(0))
    site_output(tiny_backbone, processor, site, x, processor.scene.context.at(site)[processor.rows],
                enters=True)
    for u, part in enumerate(processor.parts):
        delta = (part.word_bound[f"concept{u}"] if is_word_bound else part.deltas)[site.index, "to_q"]
        query = tiny_backbone.project(site, "to_q", x[3:])
        key = processor.keys_values[site.index][u].key[1]
        heads = [y.unflatten(-1, (site.heads, -1)) for y in (query, query + delta.apply(x[3:]), key)]
        frozen, own = (torch.einsum("bshd,nhd->bhsn", q, heads[2]) * heads[2].shape[-1]**-0.5
                       for q in heads[:2])
        acts = torch.zeros(frozen.shape[-1], dtype=torch.bool)      # where the concept's own query counts
        acts[list(WORDS) if is_word_bound else slice(None)] = True
        share = torch.where(acts, own, frozen).softmax(-1)[..., list(WORDS)].sum(-1).mean((0, 1))
        assert torch.allclose(processor.maps[site.index][u].flatten(), share, atol=1e-5)
    assert observe.picture_maps(processor.maps, processor.regions, "average", (32, 32)).shape == (2, 32, 32)


@pytest.mark.parametrize("overlap", ["average", "priority"])
def test_the_picture_shows_words_only_where_they_act(overlap):
    """Whatever the attention outside a region is; inside, the picture has the full range."""
    regions = [Region("a", box=(0.0, 0.0, 1.0, 0.5)), Region("b", box=(0.0, 0.5, 1.0, 1.0)),
               Region("c", box=(0.0, 0.0, 0.5, 0.5), start=0.9)]
    attention = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = observe.picture_maps({0: attention, 4: attention[:, :4, :4]}, regions, overlap, (16, 16))
    share, _ = shares(masks_of(regions, 16, 16), overlap)
    assert bool((found[share == 0] == 0).all()) and bool((found <= share + 1e-6).all())
    assert found[1].max() == 1 and found[1, :, 8:].min() == 0 and found[0, 8:, :8].max() > 0.5
    none = observe.picture_maps({}, regions, overlap, (4, 4))
    assert none.shape == (3, 4, 4) and not none.any()


def test_observing_costs_the_same_for_any_number_of_regions(tiny_backbone, observed):
    site, found = tiny_backbone.layout.sites[2], []
    for count in (2, 4):
        processor = observed(True, count)
        with torch.inference_mode():
            x = torch.randn(6, 16, site.width)
            processor._shares(site, x[3:], x[3:])      # prepares
            with Operations() as counter:
                processor._shares(site, x[3:], x[3:])
            found.append(counter.count)
    assert found[0] == found[1]


def test_fine_grids_are_not_observed(tiny_backbone, observed):
    processor = observed(True)
    processor.latent = (64, 64)
    site = tiny_backbone.layout.sites[0]
    assert processor._observes(site, 256) and not processor._observes(site, 1024)
    processor.is_observing = False
    assert not processor._observes(site, 256)

"""Crops of several regions in one batch: every region gets what it gets alone."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.benchmarks.cost.synthetic import context_of, deltas_of
from continual_concepts.benchmarks.regional import cost as regional_cost
from continual_concepts.core.hosts.diffusers import multi_head
from continual_concepts.core.regional.crop_processor import CropProcessor
from continual_concepts.core.regional.processor import Part, RegionProcessor
from continual_concepts.core.regional.regions import Region

COUNT, PICTURES = 3, 2


@pytest.fixture(params=[True, False], ids=["word-bound", "prompt-activated"])
def made(request, tiny_backbone, monkeypatch):
    """The scene and parts of three regions, the last without a concept."""
    monkeypatch.setattr("continual_concepts.benchmarks.cost.synthetic.WIDTH",
                        tiny_backbone.layout.sites[0].context_width)
    _, parts, _ = regional_cost.parts_of(tiny_backbone.layout, regional_cost.boxes_of(COUNT), request.param)
    parts[-1] = Part(context_of(2, 1, seed=3), {})
    return Part(context_of(2, 1, seed=1), deltas_of(tiny_backbone.layout, seed=8)), parts


@pytest.mark.parametrize("halves", [(0, 1), (1,), (1, 0, 1)])
@pytest.mark.parametrize("entered", [True, False])
@torch.no_grad()
def test_every_region_gets_what_it_gets_alone(tiny_backbone, made, halves, entered, site_output):
    scene, parts = made
    processor, site = CropProcessor(tiny_backbone, scene, parts), tiny_backbone.layout.sites[2]
    x = torch.randn(len(halves), COUNT, PICTURES, 16, site.width, generator=torch.Generator().manual_seed(0))
    text = torch.ones(len(halves) * COUNT * PICTURES, 7, site.context_width)      # whatever the scene says
    processor.take(halves, len(text))
    found = site_output(tiny_backbone, processor, site, x.flatten(0, 2), text, entered).view_as(x)
    for u, part in enumerate(parts):
        rows = torch.tensor(halves).repeat_interleave(PICTURES)
        alone = RegionProcessor(tiny_backbone, scene, [Region("a", (0, 0, 1, 1))], [part], rows, (8, 8))
        expected = site_output(tiny_backbone, alone, site, x[:, u].flatten(0, 1),
                               text[:len(rows)]).view_as(x[:, u])
        assert torch.allclose(found[:, u], expected, atol=1e-5)


@torch.no_grad()
def test_what_other_peoples_attention_adds_is_there(tiny_backbone, made, site_output):
    processor, site = CropProcessor(tiny_backbone, *made), tiny_backbone.layout.sites[2]
    x = torch.randn(2 * COUNT, 16, site.width, generator=torch.Generator().manual_seed(0))
    processor.take((0, 1), len(x))

    def theirs(*qkv):
        return multi_head(*qkv, site.heads) + 0.5

    text = torch.ones(len(x), 7, site.context_width)
    plain, found = (site_output(tiny_backbone, processor, site, x, text, replaced=code)
                    for code in (None, theirs))
    assert (found - plain).abs().min() > 0      # 0.5 everywhere, through to_out

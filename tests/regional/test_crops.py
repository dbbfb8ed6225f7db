"""Crops of several regions in one batch: every region gets what it gets alone."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.benchmarks.cost.synthetic import context_of, deltas_of
from continual_concepts.benchmarks.regional import cost as regional_cost
from continual_concepts.core.hosts.diffusers import multi_head
from continual_concepts.core.regional.crops import RegionsApart
from continual_concepts.core.regional.processor import Part, RegionProcessor
from continual_concepts.core.regional.regions import Region

COUNT, PICTURES = 3, 2


@pytest.fixture(params=[True, False], ids=["bound", "routed"])
def made(request, tiny_backbone, monkeypatch):
    """The scene and parts of three regions, the last without a concept."""
    monkeypatch.setattr("continual_concepts.benchmarks.cost.synthetic.WIDTH", tiny_backbone.layout.sites[0].context_width)
    _, parts, _ = regional_cost.parts_of(tiny_backbone.layout, regional_cost.boxes_of(COUNT), request.param)
    parts[-1] = Part(context_of(2, 1, seed=3), {})
    return Part(context_of(2, 1, seed=1), deltas_of(tiny_backbone.layout, seed=8)), parts


def through(backbone, processor, site, x, entered, theirs=None):
    text = torch.ones(len(x), 7, site.context_width)      # whatever the scene says
    if entered:
        x, reads_text = processor.enter(site, x)
        text = text if reads_text else text[:, :0]
    query, key, value = (processor.project(site, name, of, backbone.project(site, name, of))
                         for name, of in (("to_q", x), ("to_k", text), ("to_v", text)))

    def attend(*qkv):
        return multi_head(*qkv, site.heads)

    if theirs is not None:
        theirs.plain = attend
    attended = processor.attend(site, query, key, value, theirs or attend)
    return processor.project(site, "to_out", attended, backbone.project(site, "to_out", attended))


@pytest.mark.parametrize("halves", [(0, 1), (1,), (1, 0, 1)])
@pytest.mark.parametrize("entered", [True, False])
@torch.no_grad()
def test_every_region_gets_what_it_gets_alone(tiny_backbone, made, halves, entered):
    scene, parts = made
    processor, site = RegionsApart(tiny_backbone, scene, parts), tiny_backbone.layout.sites[2]
    x = torch.randn(len(halves), COUNT, PICTURES, 16, site.width, generator=torch.Generator().manual_seed(0))
    processor.take(halves, x[..., 0, 0].numel())
    found = through(tiny_backbone, processor, site, x.flatten(0, 2), entered).view_as(x)
    for u, part in enumerate(parts):
        rows = torch.tensor(halves).repeat_interleave(PICTURES)
        alone = RegionProcessor(tiny_backbone, scene, [Region("a", (0, 0, 1, 1))], [part], rows, (8, 8))
        expected = through(tiny_backbone, alone, site, x[:, u].flatten(0, 1), False).view_as(x[:, u])
        assert torch.allclose(found[:, u], expected, atol=1e-5)


@torch.no_grad()
def test_what_other_peoples_attention_adds_is_there(tiny_backbone, made):
    processor, site = RegionsApart(tiny_backbone, *made), tiny_backbone.layout.sites[2]
    x = torch.randn(2 * COUNT, 16, site.width, generator=torch.Generator().manual_seed(0))
    processor.take((0, 1), len(x))

    def theirs(*qkv):
        return multi_head(*qkv, site.heads) + 0.5

    plain, found = through(tiny_backbone, processor, site, x, False), through(tiny_backbone, processor, site, x, False, theirs)
    assert (found - plain).abs().min() > 0      # 0.5 everywhere, through to_out

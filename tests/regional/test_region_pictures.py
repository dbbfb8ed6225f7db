"""Whole pictures with concepts in regions: cost, schedule, where they act."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from continual_concepts.core.attention.token_lora import TokenLoraProcessor
from continual_concepts.core.hosts.diffusers import multi_head
from continual_concepts.core.model.processor import AttentionProcessor, HostAttention, SiteCall
from continual_concepts.core.regional.processor import Part, RegionProcessor
from continual_concepts.core.regional.regions import Region
from continual_concepts.core.sampling.regions import sample_regions
from continual_concepts.core.sampling.sampling import encode, sample
from continual_concepts.core.sampling.settings import SampleSettings
from continual_concepts.tests.quick import thinned

FULL = (0.0, 0.0, 1.0, 1.0)
LEFT, RIGHT = (0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)
QUICK = SampleSettings(steps=3, cfg=3.0, size=(32, 32))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def bank(region_bank):
    return region_bank


@pytest.mark.parametrize(("cfg", "negative"), thinned(product([1.0, 3.0], ["", "blurry <mimi>"]),
                                                     lambda place: place in (0, 3)))
def test_one_full_region_is_its_own_picture(any_backbone, bank, cfg, negative):
    """Deltas as activations and keys from memory, against the same deltas folded into the weights."""
    settings = replace(QUICK, cfg=cfg)
    region = Region("a photo of <rex>", FULL, negative=negative)
    ours = sample_regions(any_backbone, bank, "an empty <mimi> room", [region], [1, 2], settings)
    alone = sample(any_backbone, bank, ["a photo of <rex>"] * 2, [1, 2], replace(settings, negative=negative))
    assert torch.allclose(ours, alone, atol=1e-4)
    scene = sample(any_backbone, bank, ["an empty <mimi> room"] * 2, [1, 2], settings)
    assert not torch.allclose(ours, scene, atol=1e-2)


@pytest.mark.parametrize("regions", [[], [Region("<rex>", FULL, strength=0.0)]])
def test_no_region_is_the_scene(tiny_backbone, bank, regions):
    scene = sample(tiny_backbone, bank, ["a <mimi>"], [3], QUICK)
    assert torch.allclose(sample_regions(tiny_backbone, bank, "a <mimi>", regions, [3], QUICK), scene,
                          atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_one_evaluation_per_step_for_any_number_of_regions(tiny_backbone, bank, calls, count, cfg):
    sample_regions(tiny_backbone, bank, "a dog", [Region("<rex>", LEFT)] * count, [1, 2],
                   replace(QUICK, cfg=cfg))
    assert calls == [2 if cfg == 1.0 else 4] * 3


def processor_of(backbone, bank, regions, scene=None):
    context = encode(backbone, bank, ["", "a dog"])
    parts = [Part(context, bank[name].deltas) for name in ("rex", "mimi")[:len(regions)]]
    return RegionProcessor(backbone, Part(context, scene or {}), regions, parts, torch.tensor([0, 1]),
                           (8, 8)), parts


def attend(query, key, value):
    return multi_head(query, key, value, 2)


def test_regions_are_on_from_start_to_end(tiny_backbone, bank):
    processor, _ = processor_of(tiny_backbone, bank, [Region("a", FULL, start=0.25, end=0.5)])
    site, query = tiny_backbone.layout.sites[1], random(2, 16, 64)
    base = attend(query, query, query)
    for progress, on in [(0.0, False), (0.2, False), (0.25, True), (0.5, True), (0.51, False), (1.0, False),
                         (0.3, True)]:
        processor.progress = progress
        call = SiteCall(processor, site, query, query, query)
        assert torch.allclose(processor.attend(call, query, query, query, HostAttention(attend)), base) != on


def test_a_schedule_changes_the_picture(tiny_backbone, bank):
    whole, first, last = (sample_regions(tiny_backbone, bank, "a dog",
                                         [Region("<rex>", FULL, start=s, end=e)], [1], QUICK)
                          for s, e in ((0, 1), (0, 0.4), (0.6, 1)))
    assert not torch.allclose(whole, first, atol=1e-3) and not torch.allclose(first, last, atol=1e-3)


def test_a_region_acts_where_it_is(tiny_backbone, bank):
    """In the first layer alone: further on, the net spreads everything over the picture."""
    class First(AttentionProcessor):
        def __init__(self, inner):
            self.inner, self.out = inner, None

        def attend(self, call, query, key, value, attention):
            self.out = self.inner.attend(call, query, key, value,
                                         attention) if call.site.index == 0 else self.out
            call.after_out = None
            return attention(query, key, value)

    outputs = []
    for regions in ([Region("a", LEFT)], [Region("a", LEFT, strength=0.0)]):
        processor = First(processor_of(tiny_backbone, bank, regions)[0])
        tiny_backbone.predict(random(2, 4, 8, 8), torch.tensor([500, 500]),
                              encode(tiny_backbone, bank, ["", "a dog"]), processor)
        outputs.append(processor.out.view(2, 8, 8, -1))
    assert torch.equal(outputs[0][:, :, 4:], outputs[1][:, :, 4:])
    assert not torch.allclose(outputs[0][:, :, :4], outputs[1][:, :, :4], atol=1e-3)


def test_deltas_as_activations_equal_folded_ones(tiny_backbone, bank):
    latents, t = random(2, 4, 8, 8), torch.tensor([10, 900])
    context = encode(tiny_backbone, bank, ["a <rex>", "a dog"])
    with tiny_backbone.folded(bank["rex"].deltas):
        folded = tiny_backbone.predict(latents, t, context)
    assert torch.allclose(tiny_backbone.predict(latents, t, context,
                                                TokenLoraProcessor({}, bank["rex"].deltas)), folded,
                          atol=1e-4)

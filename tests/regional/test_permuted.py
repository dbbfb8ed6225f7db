"""Permuted cells: the same result with fewer operations, and only where every cell is one region's or the
scene's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from continual_concepts.benchmarks.cost.synthetic import Operations, context_of, deltas_of
from continual_concepts.benchmarks.regional import cost as regional_cost
from continual_concepts.core.model.processor import SiteCall
from continual_concepts.core.regional.processor import Part, RegionProcessor
from continual_concepts.core.regional.regions import Region
from continual_concepts.core.sampling.regions import sample_regions
from continual_concepts.core.sampling.settings import SampleSettings

PARTITIONS = {
    "whole": [(0, 0, 1, 1)],
    "halves": [(0, 0, 1, 0.5), (0, 0.5, 1, 1)],
    "quarters": [(0, 0, 0.5, 0.5), (0, 0.5, 0.5, 1), (0.5, 0, 1, 0.5), (0.5, 0.5, 1, 1)],
    "sizes apart": [(0, 0, 1, 0.75), (0, 0.75, 1, 1)],      # two groups
    "free cells": [(0, 0, 1, 0.5)],
    "islands": [(0.25, 0, 0.75, 0.25), (0.25, 0.5, 0.75, 0.75)],
}
OTHERS = {
    "overlap": [Region("a", (0, 0, 1, 0.75)), Region("b", (0, 0.5, 1, 1))],
    "soft": [Region("a", (0, 0, 1, 0.5), feather=0.2), Region("b", (0, 0.5, 1, 1), feather=0.2)],
    "weak": [Region("a", (0, 0, 1, 0.5)), Region("b", (0, 0.5, 1, 1), strength=0.5)],
    "off": [Region("a", (0, 0, 1, 0.5), end=0.2)],
    "much padding": [      # one group
        Region("a", (0, 0, 0.5, 1)), Region("b", (0.5, 0, 1, 0.5)), Region("c", (0.5, 0.5, 1, 1))],
}


@pytest.fixture
def processor(tiny_backbone, monkeypatch):
    """Regions with word-bound or prompt-activated concepts, the last of several without; the scene has one of
    each kind."""
    monkeypatch.setattr("continual_concepts.benchmarks.cost.synthetic.WIDTH",
                        tiny_backbone.layout.sites[0].context_width)

    def build(boxes, is_word_bound=True, rows=(0, 1)):
        drawn = regional_cost.boxes_of(len(boxes))
        _, parts, _ = regional_cost.parts_of(tiny_backbone.layout, drawn, is_word_bound)
        if is_word_bound:
            # the extension of to_q is padding
            without = {name: {key: delta for key, delta in deltas.items() if key[1] != "to_q"}
                       for name, deltas in parts[0].word_bound.items()}
            parts[0] = replace(parts[0], word_bound=without)
        if len(parts) > 1:
            parts[-1] = Part(context_of(2, 1, seed=3), {})
        regions = [box if isinstance(box, Region) else Region("a", box) for box in boxes]
        own = deltas_of(tiny_backbone.layout, seed=9)
        scene = Part(context_of(2, 1, seed=1, words={"own": (1, 2)}), deltas_of(tiny_backbone.layout, seed=8),
                     {"own": own})
        return RegionProcessor(tiny_backbone, scene, regions, parts, torch.tensor(rows), (8, 8))

    return build


@pytest.mark.parametrize("rows", [(0, 1), (1,), (0, 0, 0, 1, 1, 1)])
@pytest.mark.parametrize("is_word_bound", [True, False])
@pytest.mark.parametrize("name", PARTITIONS)
@torch.no_grad()
def test_permuted_cells_give_the_same(tiny_backbone, processor, site_output, name, is_word_bound, rows):
    running = processor(PARTITIONS[name], is_word_bound, rows)
    for site, cells in ((tiny_backbone.layout.sites[0], 64), (tiny_backbone.layout.sites[2], 16)):
        x = torch.randn(len(rows), cells, site.width, generator=torch.Generator().manual_seed(0))
        text = running.scene.context.at(site)[running.rows]
        one, other = (site_output(tiny_backbone, running, site, x, text, enters) for enters in (True, False))
        assert torch.allclose(one, other, atol=1e-5), (one - other).abs().max()


@pytest.mark.parametrize("name", OTHERS)
def test_other_covers_are_not_permuted(tiny_backbone, processor, name):
    running, site = processor(OTHERS[name]), tiny_backbone.layout.sites[0]
    running.progress = 0.5
    for regions, is_reordered in ((running, False), (processor(PARTITIONS["halves"]), True)):
        x, text = torch.zeros(2, 64, site.width), regions.scene.context.at(site)
        call = SiteCall(regions, site, x, text, text)
        call.enter()
        assert (call.hidden is not x) == is_reordered


def test_a_picture_is_the_same(tiny_backbone, region_bank, monkeypatch):
    settings = SampleSettings(steps=3, cfg=3.0, size=(32, 32))
    regions = [Region("<rex>", (0, 0, 1, 0.5)), Region("<mimi> at night", (0, 0.5, 1, 1)),
               Region("a car", (0, 0, 1, 1), end=0.5)]

    def picture():
        return sample_regions(tiny_backbone, region_bank, "a room", regions, [1, 2], settings)

    reordered, original = [], RegionProcessor.enter

    def enter(self, call):
        before = call.hidden
        original(self, call)
        reordered.append(call.hidden is not before)

    monkeypatch.setattr(RegionProcessor, "enter", enter)
    one = picture()
    monkeypatch.setattr(RegionProcessor, "enter", lambda *_: None)
    assert torch.allclose(one, picture(), atol=1e-4) and {True, False} == set(reordered)


@pytest.mark.parametrize("is_word_bound", [True, False])
def test_permuting_saves_operations(tiny_backbone, processor, site_output, is_word_bound):
    running, site = processor(PARTITIONS["halves"], is_word_bound), tiny_backbone.layout.sites[0]
    x, text, counts = torch.randn(2, 64, site.width), running.scene.context.at(site)[running.rows], []
    with torch.inference_mode():
        for enters in (True, False):
            site_output(tiny_backbone, running, site, x, text, enters)      # prepares
            with Operations() as counter:
                site_output(tiny_backbone, running, site, x, text, enters)
            counts.append(counter.count)
    assert counts[0] < counts[1]

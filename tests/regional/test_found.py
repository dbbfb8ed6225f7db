"""Regions without boxes: prompts of their own, masks from attention, and pictures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.regional import found as module
from continual_concepts.core.regional.found import FoundRegions
from continual_concepts.core.regional.processor import Part
from continual_concepts.core.sampling.found import sample_found
from continual_concepts.core.sampling.sampling import encode, sample
from continual_concepts.core.sampling.settings import SampleSettings

QUICK = SampleSettings(steps=5, cfg=3.0, size=(64, 64))
SCENE = "a photo of <rex> and <mimi> in a room"


@pytest.fixture(scope="module", params=["prompt-activated", "word-bound"])
def bank(request, region_bank, tiny_backbone, teach):
    if request.param == "prompt-activated":
        return region_bank
    bank = teach(tiny_backbone, ConceptBank(tiny_backbone.layout), "rex", "bound").bank
    return teach(tiny_backbone, bank, "mimi", "bound", noun="cat").bank


def processor_of(backbone, bank, pictures=2):
    prompts = bank.parse(SCENE).apart(bank.infos)
    negative = bank.parse("")
    scene, *parts = (Part(encode(backbone, bank, [negative, prompt]), {})
                     for prompt in (bank.parse(SCENE), *prompts.values()))
    words = [scene.context.words[1][name] for name in prompts]
    return FoundRegions(backbone, scene, list(prompts), parts, words,
                        torch.tensor([0] * pictures + [1] * pictures), (16, 16))


def test_masks_are_where_a_concepts_map_is_high_and_highest(tiny_backbone, region_bank):
    processor = processor_of(tiny_backbone, region_bank)
    maps = torch.full((2, 2, 8, 8), 0.01)
    # the first picture: rex left, mimi right, more faintly
    maps[0, 0, :, :3], maps[0, 1, :, 5:] = 0.6, 0.2
    maps[1, 0, :3], maps[1, 1, 5:] = 0.3, 0.9            # the second: rex above, mimi below
    processor._sums, processor.progress = {64: maps.flatten(2)}, 1.0
    assert processor.phase() == (True,)
    found = processor.found
    assert found.shape == (2, 2, 8, 8)
    assert found[0, 0, :, :3].all() and not found[0, 0, :, 5:].any()
    assert found[1, 0, :, 5:].all() and not found[1, 0, :, :3].any()
    assert found[0, 1, :3].all() and found[1, 1, 5:].all() and (found.sum(0) <= 1).all()
    rows = processor.masks((4, 4))
    # each picture's negative and positive half
    assert rows.shape == (2, 4, 4, 4) and torch.equal(rows[:, :2], rows[:, 2:])


def test_before_they_are_found_the_scene_is_all(tiny_backbone, bank, monkeypatch):
    monkeypatch.setattr(module, "FOUND_AFTER", 2.0)
    found = sample_found(tiny_backbone, bank, SCENE, [1, 2], QUICK)
    assert torch.allclose(found, sample(tiny_backbone, bank, [SCENE] * 2, [1, 2], QUICK), atol=1e-4)


def test_regions_are_found_at_the_price_of_a_plain_picture(tiny_backbone, bank, calls):
    found = sample_found(tiny_backbone, bank, SCENE, [1, 2], QUICK)
    assert calls == [4] * 5
    plain = sample(tiny_backbone, bank, [SCENE] * 2, [1, 2], QUICK)
    assert torch.isfinite(found).all() and not torch.allclose(found, plain, atol=1e-3)
    assert torch.equal(found, sample_found(tiny_backbone, bank, SCENE, [1, 2], QUICK))


def test_a_picture_does_not_depend_on_the_others_of_its_batch(tiny_backbone, bank):
    both = sample_found(tiny_backbone, bank, SCENE, [1, 2], QUICK)
    alone = [sample_found(tiny_backbone, bank, SCENE, [seed], QUICK) for seed in (1, 2)]
    assert torch.allclose(both, torch.cat(alone), atol=1e-4)


def test_without_guidance_the_prompt_alone_is_evaluated(tiny_backbone, bank, calls):
    sample_found(tiny_backbone, bank, SCENE, [1], QUICK)
    guided = list(calls)
    calls.clear()
    sample_found(tiny_backbone, bank, SCENE, [1], replace(QUICK, cfg=1.0))
    assert [2 * size for size in calls] == guided


def test_a_prompt_with_one_concept_is_plain(tiny_backbone, bank):
    found = sample_found(tiny_backbone, bank, "<rex> at night", [1], QUICK)
    assert torch.equal(found, sample(tiny_backbone, bank, ["<rex> at night"], [1], QUICK))

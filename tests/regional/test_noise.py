"""Region noise estimation, windows and solo steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from continual_concepts.core.errors import ConceptError
from continual_concepts.core.regional.noise import NoiseSettings, region_noise, scene_is_seen, window_of
from continual_concepts.core.regional.regions import Region, box_mask
from continual_concepts.core.sampling import sampling
from continual_concepts.core.sampling.regions import sample_regions
from continual_concepts.core.sampling.sampling import sample, starting_noise
from continual_concepts.core.sampling.settings import SampleSettings

FULL = (0.0, 0.0, 1.0, 1.0)
LEFT, RIGHT = (0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)
QUICK = SampleSettings(steps=3, cfg=3.0, size=(32, 32))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def noises():
    return random(2, 4, 6, 6), random(2, 2, 4, 6, 6, seed=1), torch.stack([box_mask(LEFT, 6, 6), box_mask((0, 0.25, 1, 1), 6, 6)])


def test_region_noise_by_its_formulas(noises):
    scene, regions, masks = noises
    count = masks.sum(0)
    mean = (regions * masks[:, None, None]).sum(0) / count.clamp(min=1)
    kept = torch.where(count > 0, 0.1 * scene + 0.9 * mean, scene)
    assert torch.allclose(region_noise(scene, regions, masks), kept, atol=1e-6)
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


@pytest.fixture
def bank(region_bank):
    return region_bank


def test_region_noise_evaluates_every_region(tiny_backbone, bank, calls):
    regions = [Region("<rex>", LEFT), Region("<mimi>", RIGHT)]
    noisy = sample_regions(tiny_backbone, bank, "a dog", regions, [1], replace(QUICK, noise=NoiseSettings(True)))
    assert len(calls) == 3 * 3
    assert not torch.allclose(noisy, sample_regions(tiny_backbone, bank, "a dog", regions, [1], QUICK), atol=1e-3)
    plain = sample_regions(tiny_backbone, bank, "a dog", regions, [1], replace(QUICK, noise=NoiseSettings(True, alpha=1.0)))
    assert torch.allclose(plain, sample_regions(tiny_backbone, bank, "a dog", regions, [1], QUICK), atol=1e-4)


def test_region_noise_by_area_looks_at_a_window_alone(tiny_backbone, bank, monkeypatch):
    sizes, original = [], tiny_backbone.predict
    monkeypatch.setattr(tiny_backbone, "predict", lambda x, *rest: sizes.append(tuple(x.shape[-2:])) or original(x, *rest))
    settings = replace(QUICK, size=(96, 64), noise=NoiseSettings(True, area="crop"), steps=2)
    corner = Region("<rex>", (0.0, 0.0, 0.2, 0.3))
    found = sample_regions(tiny_backbone, bank, "a dog", [corner], [1], settings)
    assert sizes == [(24, 16), (8, 8)] * 2 and torch.isfinite(found).all()      # latents are a quarter of the picture's sides
    whole = [sample_regions(tiny_backbone, bank, "a dog", [Region("<rex>", FULL)], [1],
                            replace(settings, noise=NoiseSettings(True, area=area))) for area in ("frame", "crop")]
    assert torch.equal(*whole)


def test_solo_steps_look_at_windows_alone_where_regions_cover_the_picture(tiny_backbone, bank, monkeypatch):
    """As many cells are evaluated as in a plain picture; with a rest for the scene, the whole frame too."""
    sizes, original = [], tiny_backbone.predict
    monkeypatch.setattr(tiny_backbone, "predict", lambda x, *rest: sizes.append(tuple(x.shape[-2:])) or original(x, *rest))
    settings = replace(QUICK, size=(64, 64), noise=NoiseSettings(solo=0.4), steps=4)      # progress 0, 1/3, 2/3, 1
    sample_regions(tiny_backbone, bank, "a dog", [Region("<rex>", LEFT), Region("<mimi>", RIGHT)], [1], settings)
    assert sizes == [(16, 8)] * 4 + [(16, 16)] * 2
    sizes.clear()
    sample_regions(tiny_backbone, bank, "a dog", [Region("<rex>", LEFT)], [1], settings)
    assert sizes == [(16, 16), (16, 8)] * 2 + [(16, 16)] * 2


def test_soft_edges_do_not_make_windows_larger(tiny_backbone, bank, monkeypatch):
    sizes, original = [], tiny_backbone.predict
    monkeypatch.setattr(tiny_backbone, "predict", lambda x, *rest: sizes.append(tuple(x.shape[-2:])) or original(x, *rest))
    halves = [Region("<rex>", LEFT, feather=0.2), Region("<mimi>", RIGHT, feather=0.2)]
    sample_regions(tiny_backbone, bank, "a dog", halves, [1], replace(QUICK, size=(64, 64), noise=NoiseSettings(solo=0.4), steps=4))
    assert sizes == [(16, 8)] * 4 + [(16, 16)] * 2


def test_a_solo_region_is_a_picture_of_its_own(tiny_backbone, bank, monkeypatch):
    """Solo to the end, two halves are what each prompt gives on the half's own noise. Latents: the decoder sees over the border."""
    monkeypatch.setattr(tiny_backbone, "decode_latents", lambda latents: latents)
    settings = replace(QUICK, size=(64, 64), noise=NoiseSettings(solo=1.0), steps=1)
    found = sample_regions(tiny_backbone, bank, "a dog", [Region("<rex>", LEFT), Region("<mimi>", RIGHT)], [1], settings)
    noise = starting_noise(tiny_backbone, [1], (64, 64))
    for name, half in (("rex", slice(0, 8)), ("mimi", slice(8, 16))):
        monkeypatch.setattr(sampling, "starting_noise", lambda *_, half=half: noise[..., half])
        alone = sample(tiny_backbone, bank, [f"<{name}>"], [1], settings)
        assert torch.allclose(found[..., half], alone, atol=1e-4)


def test_the_scene_is_seen_where_no_region_is():
    halves = torch.stack([box_mask(LEFT, 4, 4), box_mask(RIGHT, 4, 4)])
    assert not scene_is_seen(halves) and scene_is_seen(halves[:1]) and scene_is_seen(0.5 * halves)
    assert scene_is_seen(0.5 * halves, "priority")


@given(data=st.data())
def test_a_window_holds_its_mask(data):
    height, width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    mask = torch.zeros(height, width)
    mask[top:data.draw(st.integers(top + 1, height)), left:data.draw(st.integers(left + 1, width))] = 1
    window, x = window_of(mask), torch.rand(2, 3, height, width)
    assert window.cut(mask).sum() == mask.sum() and torch.equal(window.back(window.cut(x), x) * mask, x * mask)
    for first, last, side in ((window.top, window.bottom, height), (window.left, window.right, width)):
        assert 0 <= first < last <= side and ((last - first) % 8 == 0 or last - first == side)

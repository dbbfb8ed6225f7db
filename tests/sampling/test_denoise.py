"""Steps in which regions are evaluated alone: what is evaluated, how it is mixed, and the pictures that come
of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.regional.noise import NoiseSettings
from continual_concepts.core.regional.regions import Region, box_mask
from continual_concepts.core.sampling import sampling
from continual_concepts.core.sampling.denoise import RegionSteps
from continual_concepts.core.sampling.found import sample_found
from continual_concepts.core.sampling.regions import RegionSampling, sample_regions
from continual_concepts.core.sampling.sampling import sample, starting_noise
from continual_concepts.core.sampling.settings import SampleSettings

FULL = (0.0, 0.0, 1.0, 1.0)
LEFT, RIGHT = (0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)
QUICK = SampleSettings(steps=3, cfg=3.0, size=(32, 32))
CROPS = NoiseSettings(crop_denoising=0.4)


class Host:
    """Estimates that tell who was evaluated: 100 for the frame, its number and 1 for a region."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __call__(self, latents, regions):
        self.calls.append((regions, tuple(latents.shape)))
        numbers = [99] if regions is None else list(regions)
        values = torch.tensor(numbers).repeat_interleave(len(latents) // len(numbers)) + 1.0
        noise = values.view(-1, 1, 1, 1).expand(latents.shape)
        return {"noise": noise, "half": noise / 2}


def step(regions, noise, progress=0.0, overlap="average",
         latents=torch.zeros(2, 4, 16, 16)):  # noqa: B008 - never changed
    host, found = Host(), RegionSteps(regions, noise, overlap).at(progress, latents)
    return None if found is None else (found.estimate(latents, host), host.calls)


HALVES = [Region("a", LEFT), Region("b", RIGHT)]


def test_crops_that_cover_the_picture_are_all_that_is_evaluated():
    found, calls = step(HALVES, CROPS)
    assert calls == [((0, 1), (4, 4, 16, 8))]
    assert (found["noise"][..., :8] == 1).all() and (found["noise"][..., 8:] == 2).all()
    assert torch.equal(found["half"], found["noise"] / 2)


def test_the_frame_is_evaluated_where_it_is_seen():
    found, calls = step(HALVES[1:], CROPS)
    assert calls == [(None, (2, 4, 16, 16)), ((0,), (2, 4, 16, 8))]
    assert (found["noise"][..., :8] == 100).all() and (found["noise"][..., 8:] == 1).all()


def test_crops_of_different_sizes_are_evaluated_apart():
    found, calls = step([Region("a", (0.0, 0.0, 0.5, 0.5)), Region("b", LEFT),
                         Region("c", (0.5, 0.5, 1.0, 1.0))], CROPS)
    assert calls[1:] == [((0, 2), (4, 4, 8, 8)), ((1,), (2, 4, 16, 8))]
    # Two share the corner
    assert (found["noise"][..., :8, :8] == 1.5).all() and (found["noise"][..., 8:, 8:] == 3).all()


@pytest.mark.parametrize("area, shape", [("frame", (2, 4, 16, 16)), ("crop", (2, 4, 16, 8))])
@pytest.mark.parametrize("outside", ["keep", "literal"])
def test_region_noise_adds_a_share_of_the_scene(area, shape, outside):
    found, calls = step(HALVES[:1], NoiseSettings(True, 0.25, outside, area))
    assert calls == [(None, (2, 4, 16, 16)), ((0,), shape)]
    assert torch.allclose(found["noise"][..., :8], torch.tensor(0.25 * 100 + 0.75))
    assert torch.allclose(found["noise"][..., 8:], torch.tensor(100.0 if outside == "keep" else 25.0))


def test_steps_in_which_the_frame_is_all():
    late, off = Region("a", LEFT, start=0.5), Region("b", LEFT, strength=0.0)
    assert step(HALVES, NoiseSettings()) is None and step(HALVES, CROPS, 0.4) is None
    assert step([], NoiseSettings(True)) is None
    assert step([late, off], CROPS) is None and step([late, off], NoiseSettings(True)) is None
    assert step([off, late], NoiseSettings(True), 0.5)[1][1][0] == (1,)      # by its number among all regions


def test_soft_edges_make_no_crop_larger_and_stay_where_they_are_wanted():
    soft = [replace(region, feather=0.2) for region in HALVES]
    assert step(soft, CROPS)[1] == step(HALVES, CROPS)[1]
    found, _ = step(soft, NoiseSettings(True, 0.0))
    assert 1 < found["noise"][0, 0, 8, 7] < found["noise"][0, 0, 8, 8] < 100


def test_every_kind_of_step_is_laid_out_once():
    steps = RegionSteps([*HALVES, Region("c", FULL, end=0.1)], CROPS, "average")
    latents = torch.zeros(1, 4, 16, 16)
    found = [steps.at(progress, latents) for progress in (0.0, 0.1, 0.2, 0.3)]
    assert found[0] is found[1] and found[2] is found[3] and found[1] is not found[2]
    assert steps.at(0.3, latents[..., :8]) is not found[3]


@pytest.fixture(scope="module")
def bank(tiny_backbone, make_concept):
    """Two prompt-activated concepts and one that is always on."""
    bank = ConceptBank(tiny_backbone.layout)
    for i, name in enumerate(("rex", "mimi")):
        bank = bank.add(make_concept(tiny_backbone.layout, name, i, size=0.2))
    return bank.add(make_concept(tiny_backbone.layout, "tuned", 5, method="finetune", size=0.1))


@pytest.fixture
def evaluated(tiny_backbone, monkeypatch):
    """Shapes of what the UNet has evaluated: pictures, rows, columns."""
    seen, original = [], tiny_backbone.predict
    monkeypatch.setattr(tiny_backbone, "predict",
                        lambda x, *rest: seen.append((len(x), *x.shape[-2:])) or original(x, *rest))
    return seen


PROMPTS = [Region("<rex>", LEFT), Region("<mimi>", RIGHT)]


def test_region_noise_evaluates_every_region(tiny_backbone, bank, evaluated):
    noisy = sample_regions(tiny_backbone, bank, "a dog", PROMPTS, [1],
                           replace(QUICK, noise=NoiseSettings(True)))
    # Both halves of guidance; latents are a quarter of the picture's sides
    assert evaluated == [(2, 8, 8)] * 9
    without = sample_regions(tiny_backbone, bank, "a dog", PROMPTS, [1], QUICK)
    assert not torch.allclose(noisy, without, atol=1e-3)
    scene_alone = replace(QUICK, noise=NoiseSettings(True, alpha=1.0))
    assert torch.allclose(sample_regions(tiny_backbone, bank, "a dog", PROMPTS, [1], scene_alone), without,
                          atol=1e-4)


def test_region_noise_by_area_evaluates_a_crop(tiny_backbone, bank, evaluated):
    settings = replace(QUICK, size=(96, 64), noise=NoiseSettings(True, area="crop"), steps=2)
    sample_regions(tiny_backbone, bank, "a dog", [Region("<rex>", (0.0, 0.0, 0.2, 0.3))], [1], settings)
    assert evaluated == [(2, 24, 16), (2, 8, 8)] * 2
    whole = [sample_regions(tiny_backbone, bank, "a dog", [Region("<rex>", FULL)], [1],
                            replace(settings, noise=NoiseSettings(True, area=area)))
             for area in ("frame", "crop")]
    assert torch.equal(*whole)


@pytest.mark.parametrize("cfg, halves", [(3.0, 2), (1.0, 1)])
def test_crop_denoising_costs_no_more_cells_than_a_plain_picture(tiny_backbone, bank, evaluated, cfg, halves):
    settings = replace(QUICK, size=(64, 64), cfg=cfg, noise=CROPS, steps=4)      # progress 0, 1/3, 2/3, 1
    sample_regions(tiny_backbone, bank, "a dog", PROMPTS, [1, 2], settings)
    assert evaluated == [(4 * halves, 16, 8)] * 2 + [(2 * halves, 16, 16)] * 2


def test_a_region_in_crop_denoising_is_a_picture_of_its_own(tiny_backbone, bank, monkeypatch):
    """Two halves are what each prompt gives on the half's own noise. Latents: the decoder sees over the
    border."""
    monkeypatch.setattr(tiny_backbone, "decode_latents", lambda latents: latents)
    settings = replace(QUICK, size=(64, 64), noise=NoiseSettings(crop_denoising=1.0), steps=1)
    found = sample_regions(tiny_backbone, bank, "a dog", PROMPTS, [1, 2], settings)
    noise = starting_noise(tiny_backbone, [1, 2], (64, 64))
    for name, half in (("rex", slice(0, 8)), ("mimi", slice(8, 16))):
        monkeypatch.setattr(sampling, "starting_noise", lambda *_, half=half: noise[..., half])
        alone = sample(tiny_backbone, bank, [f"<{name}>"] * 2, [1, 2], settings)
        assert torch.allclose(found[..., half], alone, atol=1e-4)


@torch.no_grad()
def test_a_batch_of_crops_gives_what_crops_give_one_by_one(tiny_backbone, bank, monkeypatch):
    run = RegionSampling(tiny_backbone, bank, bank.parse("a dog"), PROMPTS, 2, replace(QUICK, noise=CROPS),
                         (16, 16))
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    batched = run.estimate(latents, 500, 0.0)
    monkeypatch.setattr("continual_concepts.core.sampling.denoise.batches_of",
                        lambda crops, _most: [[i] for i in range(len(crops))])
    run.steps = RegionSteps(run.steps.regions, CROPS, "average")
    one_by_one = run.estimate(latents, 500, 0.0)
    assert float((batched - one_by_one).norm() / one_by_one.norm()) < 1e-5


def test_the_mask_of_a_box_is_where_its_noise_goes():
    found, _ = step([Region("a", (0.25, 0.25, 0.75, 0.75))], CROPS)
    assert torch.equal(found["noise"][0, 0] == 1, box_mask((0.25, 0.25, 0.75, 0.75), 16, 16).bool())


def test_every_step_of_every_batch_is_reported(tiny_backbone, bank):
    """With regions, where they are found, and without any; the pictures stay as they are."""
    steps = []
    shown = replace(QUICK, batch=1, on_step=lambda: steps.append(1))
    for draw in (partial(sample_regions, tiny_backbone, bank, "a dog", PROMPTS, [1, 2]),
                 partial(sample_found, tiny_backbone, bank, "<rex> and <mimi>", [1, 2])):
        assert torch.equal(draw(shown), draw(QUICK)) and len(steps) == QUICK.steps
        steps.clear()
    sample_regions(tiny_backbone, bank, "a <rex>", [], [1, 2], shown)
    assert len(steps) == 2 * QUICK.steps

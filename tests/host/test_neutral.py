"""Neutral settings are plain ComfyUI bit for bit, and nothing of one run reaches the next."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.usefixtures("as_in_comfyui")
SCENE, NEGATIVE = "a photo of a red dog on a beach", "blurry"


def mask(height: int = 16, width: int = 16) -> torch.Tensor:
    found = torch.zeros(1, height, width)
    found[:, height // 4:, : width // 2] = 1.0
    return found


@pytest.mark.parametrize("mode", ["sharp", "paper", "released code", "equal merge"])
@pytest.mark.parametrize("held", ["none", "empty"])
def test_no_concepts_give_the_model_and_the_clip_as_they_are(studio, held, mode):
    from continual_concepts.core.bank.bank import ConceptBank

    bank = None if held == "none" else ConceptBank(studio.bank.layout)
    model, clip, positive = studio.aggregate(SCENE, bank, mode)
    assert model is studio.model and clip is studio.clip
    assert torch.equal(studio.ksampler(model, positive, NEGATIVE),
                       studio.ksampler(studio.model, SCENE, NEGATIVE))


@pytest.mark.parametrize("mode", ["sharp", "paper", "released code", "equal merge"])
def test_strength_zero_without_placeholders(studio, mode):
    model, clip, positive = studio.aggregate(SCENE, studio.bank, mode, strength=0.0)
    ours = studio.ksampler(model, positive, studio.encode(clip, NEGATIVE), studio.latent(2))
    assert torch.equal(ours, studio.ksampler(studio.model, SCENE, NEGATIVE, studio.latent(2)))


def test_sharp_mode_without_placeholders(studio):
    model, clip, positive = studio.aggregate(SCENE, studio.bank)
    assert not model.patches
    assert torch.equal(studio.ksampler(model, positive, studio.encode(clip, NEGATIVE)),
                       studio.ksampler(studio.model, SCENE, NEGATIVE))


def test_strength_changes_pictures(studio):
    results = []
    for strength in (0.0, 0.5, 1.0):
        model, clip, positive = studio.aggregate("a photo of <rex>", studio.bank, strength=strength)
        results.append(studio.ksampler(model, positive, studio.encode(clip, "")))
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])


@pytest.mark.parametrize("sampler, scheduler", [
    ("euler", "normal"), ("euler_ancestral", "karras"), ("dpmpp_2m_sde", "karras"), ("heun", "exponential"),
                                                ("dpm_2", "sgm_uniform"),
    ("dpmpp_sde", "simple"), ("ddim", "ddim_uniform"), ("uni_pc", "beta"), ("lcm", "simple")])
def test_without_regions_it_is_ksampler(studio, sampler, scheduler):
    """With a bank whose concepts the scene does not name; without one: below."""
    ours = studio.regional(SCENE, bank=studio.bank, negative_scene=NEGATIVE, sampler_name=sampler,
                           scheduler=scheduler)
    assert torch.equal(ours,
                       studio.ksampler(studio.model, SCENE, NEGATIVE, sampler=sampler, scheduler=scheduler))


@pytest.mark.parametrize("case", ["cfg 1", "denoise", "inpainting", "batch", "wide"])
@pytest.mark.parametrize("off", [False, True])
def test_without_regions_other_settings(studio, case, off):
    settings, latent = {}, studio.latent()
    if case == "cfg 1":
        settings = {"cfg": 1.0}
    elif case == "denoise":
        settings, latent = {"denoise": 0.6}, studio.latent(content=True)
    elif case == "inpainting":
        settings, latent = {"denoise": 0.8}, studio.latent(content=True, noise_mask=mask())
    elif case == "batch":
        latent = studio.latent(3)
    else:
        latent = studio.latent(1, 10, 24)
    regions = [studio.region("a photo of a cat", right=0.5, strength=0.0)] if off else []
    ours = studio.regional(SCENE, regions, latent=dict(latent), negative_scene=NEGATIVE, **settings)
    assert torch.equal(ours, studio.ksampler(studio.model, SCENE, NEGATIVE, latent, **settings))


def test_conditionings_instead_of_texts(studio):
    positive, negative = studio.encode(studio.clip, "a red car"), studio.encode(studio.clip, NEGATIVE)
    ours = studio.regional(SCENE, bank=studio.bank, positive=positive, negative=negative)
    assert torch.equal(ours, studio.ksampler(studio.model, positive, negative))


def test_a_concept_in_the_scene_is_what_aggregating_it_gives(studio):
    model, clip, positive = studio.aggregate("<rex> on a beach", studio.bank)
    theirs = studio.ksampler(model, positive, studio.encode(clip, ""), sampler="euler_ancestral")
    ours = studio.regional("<rex> on a beach", bank=studio.bank, sampler_name="euler_ancestral")
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m_sde"])
@pytest.mark.parametrize("noise", [False, True])
def test_a_b_a_with_regions(studio, sampler, noise):
    def picture(prompts, seed):
        regions = [studio.region(prompt, left=0.5 * i, right=0.5 * i + 0.5)
                   for i, prompt in enumerate(prompts)]
        return studio.regional("in a meadow", regions, studio.bank, sampler_name=sampler, seed=seed,
                               region_noise=noise)

    first = picture(("<rex>", "<mimi>"), 1)
    other = picture(("<mimi>", "<blueprint>"), 2)
    again = picture(("<rex>", "<mimi>"), 1)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_a_b_a_with_aggregation(studio, sampler):
    def picture(prompt, mode="sharp"):
        model, clip, positive = studio.aggregate(prompt, studio.bank, mode)
        return studio.ksampler(model, positive, studio.encode(clip, ""), sampler=sampler)

    plain = studio.ksampler(studio.model, SCENE, "")
    first, _, _, again = picture("<rex>"), picture("<mimi>",
                                                   "paper"), studio.regional(SCENE), picture("<rex>")
    assert torch.equal(first, again)
    assert torch.equal(plain, studio.ksampler(studio.model, SCENE, ""))


def test_the_same_region_objects_serve_many_runs(studio):
    regions = [studio.region("<rex>", right=0.5), studio.region("<mimi>", left=0.5)]
    sizes = [studio.latent(), studio.latent(2, 8, 24), studio.latent()]
    first, _, again = (studio.regional("in a meadow", regions, studio.bank, latent=latent)
                       for latent in sizes)
    assert torch.equal(first, again)

"""Attention guidance in ComfyUI's sampling: it changes pictures, at 0 nothing, and the model never."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.usefixtures("as_in_comfyui")
TWO, ONE = "a photo of <rex> and <mimi> in a meadow", "a photo of <rex> in a meadow"


def weights(studio) -> list[torch.Tensor]:
    """Of the plain model, which a picture of its own brings back."""
    studio.ksampler(studio.model, "a dog", "", steps=1)
    return [parameter.detach().clone() for parameter in studio.model.model.diffusion_model.parameters()]


@pytest.fixture
def calls(studio):
    """Batch sizes of the UNet's calls from here on."""
    seen = []
    unet = studio.model.model.diffusion_model
    hook = unet.register_forward_pre_hook(lambda _unet, inputs: seen.append(len(inputs[0])))
    yield seen
    hook.remove()


def test_it_is_the_same_at_zero(studio, calls):
    plain = studio.regional(TWO, bank=studio.bank)
    assert torch.equal(studio.regional(TWO, bank=studio.bank, artists=0.0), plain)
    model, clip, positive = studio.aggregate(TWO, studio.bank)
    assert torch.equal(studio.ksampler(model, positive, studio.encode(clip, "")), plain) and calls == [2] * 9


@pytest.mark.parametrize("scene", [ONE, "a dog and a cat"])
def test_fewer_than_two_concepts_are_left_alone(studio, scene):
    assert torch.equal(studio.regional(scene, bank=studio.bank, artists=2.0),
                       studio.regional(scene, bank=studio.bank))


def test_regions_have_no_use_for_them(studio):
    regions = [studio.region("<rex>", right=0.5), studio.region("<mimi>", left=0.5)]
    found = studio.regional(TWO, regions, studio.bank, artists=2.0)
    assert torch.equal(found, studio.regional(TWO, regions, studio.bank))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "euler_ancestral", "dpmpp_2m_sde"])
def test_they_change_the_picture_and_nothing_stays(studio, sampler):
    """A, B, A: the first picture twice, and the model's weights bit for bit."""
    before = weights(studio)
    plain = studio.regional(TWO, bank=studio.bank, sampler_name=sampler)
    first = studio.regional(TWO, bank=studio.bank, sampler_name=sampler, artists=1.0)
    other = studio.regional("<mimi> and <blueprint>", bank=studio.bank, sampler_name=sampler, artists=2.0,
                            seed=2)
    again = studio.regional(TWO, bank=studio.bank, sampler_name=sampler, artists=1.0)
    assert torch.isfinite(first).all() and torch.equal(first, again)
    assert not torch.allclose(first, plain, atol=1e-2) and not torch.equal(first, other)
    assert torch.equal(studio.regional(TWO, bank=studio.bank, sampler_name=sampler), plain)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(studio), strict=True))


def test_they_look_in_the_first_quarter_only(studio, calls):
    studio.regional(TWO, bank=studio.bank, artists=1.0, steps=6)
    assert calls == [1, 2] * 2 + [2] * 4


@pytest.mark.parametrize("case", ["batch", "wide", "inpainting", "denoise", "long"])
def test_they_work_with(studio, case):
    scene, settings, latent = TWO, {}, studio.latent(content=True)
    if case == "batch":
        latent = studio.latent(3)
    elif case == "wide":
        latent = studio.latent(1, 10, 24)
    elif case == "inpainting":
        mask = torch.zeros(1, 16, 16)
        mask[..., :8] = 1
        latent = studio.latent(content=True, noise_mask=mask)
    elif case == "denoise":
        settings = {"denoise": 0.6}
    else:
        scene = TWO + " with a red ball" * 12
    plain, moved = (studio.regional(scene, bank=studio.bank, latent=dict(latent), artists=s, **settings)
                    for s in (0.0, 1.0))
    assert torch.isfinite(moved).all() and not torch.allclose(plain, moved, atol=1e-2)
    if case == "inpainting":
        assert torch.allclose(moved[..., 8:], latent["samples"][..., 8:], atol=1e-5)


def test_a_conditioning_of_the_scene_is_the_scene(studio):
    _, clip, positive = studio.aggregate(TWO, studio.bank)
    found = studio.regional(TWO, bank=studio.bank, positive=positive, artists=1.0)
    assert torch.equal(found, studio.regional(TWO, bank=studio.bank, artists=1.0))


def test_other_nodes_patches_still_act(studio):
    model = studio.model.clone()
    model.set_model_attn2_output_patch(lambda n, options: 0.9 * n)
    found = studio.regional(TWO, bank=studio.bank, model=model, artists=1.0)
    assert torch.isfinite(found).all()
    assert not torch.allclose(found, studio.regional(TWO, bank=studio.bank, artists=1.0), atol=1e-3)


def test_positions_are_those_of_learning(studio, reference):
    """What the host finds in its tokens is what the other host's encoding says."""
    from continual_concepts.core.comfy.concept_clip import concept_clip, subject_of
    from continual_concepts.core.conditioning.encoding import encode_prompts, text_positions

    subject = subject_of(concept_clip(studio.clip, studio.bank, True), TWO)
    tokens = {concept.name: concept.tokens for concept in studio.bank}
    words = encode_prompts(reference, studio.bank.vocabulary.parse_all([TWO]), tokens).words[0]
    assert subject.concepts == tuple(words.values())
    assert subject.text == text_positions(reference, studio.bank.vocabulary.parse(TWO))
    assert subject_of(studio.clip, "a dog").concepts == ()


def test_one_step_is_the_other_hosts(studio, reference):
    """A whole picture by Euler, against the same steps taken by hand in the other host."""
    from continual_concepts.core.conditioning.encoding import encode_prompts, text_positions
    from continual_concepts.core.conditioning.routing import aggregate
    from continual_concepts.core.sampling.attention_guidance import AttentionGuidance, Subject

    vocabulary, tokens = studio.bank.vocabulary, {concept.name: concept.tokens for concept in studio.bank}
    positive = encode_prompts(reference, vocabulary.parse_all([TWO]), tokens)
    text = text_positions(reference, vocabulary.parse(TWO))
    guidance = AttentionGuidance([Subject(tuple(positive.words[0].values()), text)], 1.0)
    sampling = studio.model.get_model_object("model_sampling")
    import comfy.samplers

    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 4)
    deltas = aggregate(reference, studio.bank, studio.bank.parse(TWO)).deltas
    with torch.inference_mode(False), torch.no_grad(), reference.folded(deltas):
        x = studio.noise(seed=1) * (1 + float(sigmas[0]) ** 2) ** 0.5
        for i, (sigma, after) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)):
            t, scale = sampling.timestep(torch.tensor([sigma])).long(), (1 + sigma**2) ** 0.5

            def evaluate(latents, processor, t=t):
                return reference.predict(latents, t, positive, processor)

            if guidance.acts(i / 3):
                x = guidance.moved(x / scale, evaluate) * scale
            noise = reference.schedule.to_epsilon(reference.predict(x / scale, t, positive), x / scale, t)
            x = x + noise * (after - sigma)
    found = studio.regional(TWO, bank=studio.bank, steps=4, cfg=1.0, artists=1.0)
    x = studio.model.model.process_latent_out(x)
    assert ((found - x).norm() / x.norm()).item() < 0.02

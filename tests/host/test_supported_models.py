"""Cosmos Predict2 with random weights on every version of ComfyUI, and one sentence for every other model."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.errors import ConceptError

from .joint_checks import nodes_that_compute_with_conditionings_carry_concepts_along
from .make_transformer import cosmos_clip, cosmos_model, smallest, wan_vae

pytestmark = pytest.mark.usefixtures("as_in_comfyui", "own_folder")
SCENE = "a photo of a meadow"
# models that the families know; all others are refused
UNETS = {"SD15", "SD20", "SD21UnclipL", "SD21UnclipH", "SDXL", "SDXLRefiner", "SSD1B", "Segmind_Vega",
         "KOALA_700M", "KOALA_1B", "SD15_instructpix2pix", "SDXL_instructpix2pix", "LotusD", "SD_X4Upscaler",
         "Stable_Zero123", "SVD_img2vid", "SV3D_u", "SV3D_p"}
TRANSFORMERS = {"Anima", "CosmosT2IPredict2", "CosmosI2VPredict2", "Flux", "FluxSchnell", "FluxInpaint",
                "Flux2", "Chroma", "Krea2"}


def without_weights(config):
    """A MODEL of a class in ComfyUI's list, without a denoiser."""
    made = config({**config.unet_config, "disable_unet_model_creation": True})
    return SimpleNamespace(model=made.get_model({}, device=torch.device("cpu")))


def test_every_other_model_is_refused_in_one_sentence(comfyui):
    import comfy.supported_models

    from continual_concepts.core.comfy.families import SUPPORTED, find_sites

    refused, unbuilt = set(), set()
    for config in comfy.supported_models.models:
        if config.__name__ in UNETS | TRANSFORMERS:
            continue
        try:
            model = without_weights(config)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError):
            unbuilt.add(config.__name__)      # needs a file's weights to be made
            continue
        with pytest.raises(ConceptError) as error:
            find_sites(model, (("t5xxl", 1024),))
        message = str(error.value)
        assert type(model.model).__name__ in message and SUPPORTED in message and "\n" not in message
        refused.add(config.__name__)
    print("refused:", sorted(refused), "not built:", sorted(unbuilt))
    assert len(refused) > 3 * len(unbuilt) and {"WAN21_T2V", "SD3", "Lumina2"} <= refused


@pytest.fixture(scope="module")
def cosmos(pack, comfyui):
    from .conftest import Studio

    sizes = smallest()
    with torch.inference_mode():
        studio = Studio(pack, (cosmos_model(sizes), cosmos_clip(), wan_vae(sizes)), None)
    studio.side = 64
    studio.latent = lambda count=1: {"samples": torch.zeros(count, 16, 1, 8, 8)}
    return studio


def test_cosmos_predict2_learns_applies_and_draws_regions(cosmos):
    dogs = "dog dog dog dog"
    plain = cosmos.ksampler(cosmos.model, f"a photo of {dogs}", "bad")
    bank = cosmos.learn(method="slots", steps=2, preview_every=2)
    bank = cosmos.learn(method="lora", steps=2, name="ink", noun="painting", kind="style", bank=[bank])
    model, clip, positive = cosmos.aggregate("a photo of <spot>", bank)
    changed = cosmos.ksampler(model, positive, cosmos.encode(clip, "bad"))
    assert torch.isfinite(changed).all() and not torch.allclose(changed, plain, atol=1e-3)
    assert torch.equal(cosmos.ksampler(cosmos.model, f"a photo of {dogs}", "bad"), plain)
    off, clip, positive = cosmos.aggregate("a photo of <spot>", bank, strength=0.0)
    assert torch.equal(cosmos.ksampler(off, positive, cosmos.encode(clip, "bad")), plain)
    assert torch.equal(cosmos.regional(SCENE, bank=bank), cosmos.ksampler(cosmos.model, SCENE, ""))
    both, clip, positive = cosmos.aggregate("<ink> of <spot>", bank)
    whole = cosmos.ksampler(both, positive, cosmos.encode(clip, ""))
    region = cosmos.regional(SCENE, [cosmos.region("<ink> of <spot>")], bank, isolation=0.5)
    assert torch.allclose(region, whole, atol=1e-3, rtol=1e-3)
    two = [cosmos.region("<spot>", right=0.5), cosmos.region("<ink>", left=0.5)]
    assert torch.isfinite(cosmos.regional(SCENE, two, bank, solo=0.5)).all()
    bank = cosmos.learn(method="slots", steps=2, name="tom", noun="cat", bank=[bank])
    nodes_that_compute_with_conditionings_carry_concepts_along(cosmos, bank)


def test_a_clip_of_another_model_is_refused(cosmos, studio, make_concept):
    """Older hosts load Anima as Cosmos Predict2 with a wrong CLIP."""
    from continual_concepts.core.comfy.backbone import ComfyBackbone

    bank = ConceptBank(ComfyBackbone(cosmos.model, cosmos.clip).layout)
    with pytest.raises(ConceptError) as error:
        cosmos.aggregate("a dog", bank.add(make_concept(bank.layout)), clip=studio.clip)
    message, has_anima = str(error.value), importlib.util.find_spec("comfy.ldm.anima") is not None
    assert "class is CosmosPredict2, but the CLIP has the text encoders clip_l" in message
    assert message.endswith("connect the model's own CLIP" if has_anima else "update ComfyUI")


def test_the_backbone_of_cosmos_predicts_what_the_sampler_predicts(cosmos):
    from continual_concepts.core.comfy.backbone import ComfyBackbone
    from continual_concepts.core.model.context import Context

    backbone = ComfyBackbone(cosmos.model, cosmos.clip)
    with torch.inference_mode(False), backbone.training(), torch.no_grad():
        latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
        prompt, times = backbone.text[0].encode_pieces(())[0].repeat(2, 1, 1), torch.tensor([80, 640])
        share = backbone.schedule.sigma(times).view(-1, 1, 1, 1)
        sigma = (share / (1 - share)).flatten()
        base = cosmos.model.model
        denoised = base.apply_model((latents / (1 - share)).unsqueeze(2), sigma, c_crossattn=prompt)[:, :, 0]
        velocity = backbone.predict(latents, times, Context(prompt.unsqueeze(1)))
    # what the sampler calls denoised
    assert torch.allclose((1 - share) * (latents / (1 - share)) - share * velocity, denoised, atol=1e-3,
                          rtol=1e-3)


def test_flux_in_a_comfyui_without_attention_patches_is_refused(comfyui, monkeypatch):
    import comfy.ldm.flux.model

    from continual_concepts.core.comfy.families import find_sites, flux

    denoiser = comfy.ldm.flux.model.Flux.__new__(comfy.ldm.flux.model.Flux)
    denoiser.params = None
    monkeypatch.setattr(flux, "HAS_PATCHES", False)
    with pytest.raises(ConceptError, match="no attention patches in this version of ComfyUI; update"):
        find_sites(SimpleNamespace(model=SimpleNamespace(
            diffusion_model=denoiser, model_config=SimpleNamespace(unet_config={}))), (("t5xxl", 4096),))

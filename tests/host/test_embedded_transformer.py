"""A base file with a transformer in ComfyUI: all methods, prompts, regions, and pictures to latents."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.errors import ConceptError

pytestmark = pytest.mark.usefixtures("as_in_comfyui")
SCENE, NEGATIVE = "a photo of a red dog on a beach", "blurry"


@pytest.fixture(scope="module", params=["cross-attention", "joint"])
def own(request, pack, comfyui):
    from continual_concepts.core.comfy.demo import load_demo_file

    from .conftest import Studio

    if request.param == "joint":
        request.getfixturevalue("has_patches")
    file = request.getfixturevalue("joint_base" if request.param == "joint" else "transformer_base")
    with torch.inference_mode():
        return Studio(pack, load_demo_file(file), None)


def is_joint(own) -> bool:
    return type(own.model.model.diffusion_model).__name__ == "Flux"


@pytest.fixture(scope="module")
def learned(own):
    with torch.inference_mode():
        first = own.learn(name="spot", method="slots")
        return own.learn(name="tom", noun="cat", method="slots" if is_joint(own) else "cidm", bank=first)


def test_the_node_loads_a_transformer_once_its_file_is_there(pack, transformer_base, monkeypatch):
    from continual_concepts.core.demo import bases

    monkeypatch.setitem(bases.TRANSFORMERS, "embedded-dit", transformer_base)
    model, clip, vae, _ = pack.ConceptDemoBase.execute("embedded-dit").args
    assert type(model.model.diffusion_model).__name__ == "MiniTrainDIT"
    assert clip.tokenize("a dog") and vae.latent_channels == 6


@pytest.mark.parametrize("kind, method", [
    ("object", "slots"), ("style", "slots"), ("object", "lora"), ("object", "bound"), ("object", "cidm"),
    ("object", "cns")])
def test_concepts_act_where_a_prompt_names_them(own, kind, method):
    before = [weight.clone() for weight in own.model.model.diffusion_model.parameters()]
    if is_joint(own) and method not in ("slots", "lora"):
        with pytest.raises(ConceptError, match=f"'{method}' learns words, .* takes none; .*: lora, slots"):
            own.learn(kind=kind, method=method)
        return
    bank = own.learn(kind=kind, noun="drawing" if kind == "style" else "dog", method=method, preview_every=2)
    model, clip, _ = own.aggregate("", bank)
    negative = own.encode(clip, NEGATIVE)
    plain = own.ksampler(own.model, SCENE, NEGATIVE)
    assert torch.equal(own.ksampler(model, own.encode(clip, SCENE), negative), plain)
    changed = own.ksampler(*own.aggregate("a <spot> on a beach", bank)[::2], negative)
    assert torch.isfinite(changed).all() and not torch.equal(changed, plain)
    assert torch.equal(own.ksampler(own.model, SCENE, NEGATIVE), plain)
    assert all(map(torch.equal, before, own.model.model.diffusion_model.parameters()))


def test_neutral_settings_are_plain_comfyui_bit_for_bit(own, learned):
    plain = own.ksampler(own.model, SCENE, NEGATIVE)
    model, clip, positive = own.aggregate(SCENE, learned)
    assert torch.equal(own.ksampler(model, positive, own.encode(clip, NEGATIVE)), plain)
    assert torch.equal(own.regional(SCENE, bank=learned, negative_scene=NEGATIVE), plain)
    assert torch.equal(own.regional(SCENE, [own.region("a <spot>", strength=0.0)], learned,
                                    negative_scene=NEGATIVE), plain)


@pytest.mark.parametrize("settings", [{}, {"solo": 0.7}, {"region_noise": True}], ids=str)
def test_two_concepts_in_two_boxes(own, learned, settings):
    scene = "a photo of a dog and a cat"
    plain = own.regional(scene, bank=learned)
    boxes = [own.region("a <spot>", right=0.5), own.region("a <tom>", left=0.5)]
    both = own.regional(scene, boxes, learned, **settings)
    left = own.regional(scene, boxes[:1], learned, **settings)
    assert torch.isfinite(both).all() and both.shape == plain.shape
    assert not torch.equal(both, plain) and not torch.equal(both, left)


def test_pictures_to_latents_and_back(own):
    picture = own.photos(1)
    encoded = own.stock.VAEEncode().encode(own.vae, picture)[0]
    drawn = own.ksampler(own.model, SCENE, NEGATIVE, latent=encoded, steps=4, denoise=0.5)
    again = own.stock.VAEDecode().decode(own.vae, {"samples": drawn})[0]
    assert drawn.ndim == (4 if is_joint(own) else 5) and again.shape == picture.shape
    masked = encoded | {"noise_mask": torch.cat([torch.zeros(1, own.side, own.side // 2),
                                                 torch.ones(1, own.side, own.side // 2)], 2)}
    inpainted = own.ksampler(own.model, SCENE, NEGATIVE, latent=masked, steps=4)
    half = inpainted.shape[-1] // 2
    kept = encoded["samples"].reshape(inpainted.shape)
    assert torch.allclose(inpainted[..., :half], kept[..., :half], atol=1e-4)
    assert not torch.allclose(inpainted[..., half:], kept[..., half:], atol=1e-1)

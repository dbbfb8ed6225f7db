"""An embedded base of any size is the same model in ComfyUI and in the diffusers host."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.conditioning.routing import aggregate
from continual_concepts.core.demo.base import load_base
from continual_concepts.core.demo.bases import FILES, JOINT, TRANSFORMERS
from continual_concepts.core.errors import ConceptError

TOLERANCE = 1e-4
OTHER, RANDOM = "sizes of its own", "a transformer of random numbers"
TRAINED = {name: file for name, file in (FILES | TRANSFORMERS).items() if file.exists()}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module", params=[OTHER, RANDOM, *TRAINED])
def both(comfyui, other_base, transformer_base, request):
    """The same file in ComfyUI and in the diffusers host, and ComfyUI's MODEL, CLIP and VAE."""
    from continual_concepts.core.comfy.backbone import ComfyBackbone
    from continual_concepts.core.comfy.demo import load_demo_file

    if request.param == JOINT:
        request.getfixturevalue("has_patches")
    file = {OTHER: other_base, RANDOM: transformer_base, **TRAINED}[request.param]
    with torch.inference_mode():
        parts = load_demo_file(file)
    return ComfyBackbone(*parts), load_base(file), parts


def test_a_base_with_joint_attention_needs_attention_patches(comfyui, joint_base, monkeypatch):
    from continual_concepts.core.comfy import demo

    monkeypatch.setattr(demo, "HAS_PATCHES", False)
    with pytest.raises(ConceptError, match="form of Flux.2, whose blocks have no .* update ComfyUI to 0.33"):
        demo.load_demo_file(joint_base)


def test_layout_and_sizes(both):
    ours, theirs, (model, _, vae) = both
    assert ours.layout == theirs.layout and ours.fingerprint == theirs.fingerprint
    assert ours.latent_channels == theirs.latent_channels == vae.latent_channels
    assert model.get_model_object("latent_format").latent_channels == theirs.latent_channels
    assert ours.picture_multiple == theirs.picture_multiple == vae.downscale_ratio


def test_pictures_to_latents_and_back(both):
    ours, theirs, _ = both
    side = theirs.picture_size
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = theirs.encode_images(x)
    assert latents.shape[-1] * theirs.picture_multiple == side
    assert distance(ours.encode_images(x), latents) < TOLERANCE
    assert distance(ours.decode_latents(latents), theirs.decode_latents(latents)) < TOLERANCE


@pytest.mark.parametrize("prompt", ["a photo of a red dog on a beach", "a photo of <rex> in a meadow"])
@torch.no_grad()
def test_prompts_and_predictions(both, make_concept, prompt):
    ours, theirs, _ = both
    bank = ConceptBank(theirs.layout).add(make_concept(theirs.layout, "rex", layerwise=True, size=0.3))
    parsed, names = bank.vocabulary.parse_all([prompt] * 2), bank.vocabulary.parse(prompt).concepts
    contexts = [encode_prompts(host, parsed, {name: bank[name].tokens for name in names})
                for host in (ours, theirs)]
    assert distance(contexts[0].hidden, contexts[1].hidden) < TOLERANCE
    side = theirs.picture_size // theirs.picture_multiple
    noise = torch.randn(2, theirs.latent_channels, side, side, generator=torch.Generator().manual_seed(5))
    deltas, times = aggregate(theirs, bank, bank.parse(prompt)).deltas, torch.tensor([120, 700])
    with ours.folded(deltas), theirs.folded(deltas):
        outputs = [host.predict(noise, times, context)
                   for host, context in zip((ours, theirs), contexts, strict=True)]
    assert distance(*outputs) < TOLERANCE


def test_ksampler_draws_and_decodes(both, pack):
    """ComfyUI's empty latents have four channels, and the host fits them to the model."""
    import nodes

    _, theirs, (model, clip, vae) = both
    side = theirs.picture_size // theirs.picture_multiple
    with torch.inference_mode():
        prompts = [clip.encode_from_tokens_scheduled(clip.tokenize(text))
                   for text in ("a photo of a dog", "")]
        empty = nodes.EmptyLatentImage().generate(8 * side, 8 * side, 1)[0]
        latents = nodes.common_ksampler(model, 1, 2, 3.0, "euler", "normal", *prompts, empty)[0]
        picture = nodes.VAEDecode().decode(vae, latents)[0]
    assert picture.shape == (1, theirs.picture_size, theirs.picture_size, 3) and picture.std() > 0

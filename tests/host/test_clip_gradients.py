"""The host's CLIP while learning goes through it: the same numbers, and afterwards what it was."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.bank.tokens import TokenGroup
from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.hosts.quick_gelu import quick_gelu

PROMPT = "a photo of <rex> in a meadow"


@pytest.fixture(params=[torch.float32, torch.float16])
def backbone(comfyui, request):
    """A base of its own, whose CLIP is stored in that type and computes in float32, as ComfyUI's loaders have
    it."""
    import comfy.ops

    from continual_concepts.core.comfy.backbone import ComfyBackbone
    from continual_concepts.core.comfy.demo import load_demo

    with torch.inference_mode():
        model, clip, vae = load_demo(name="embedded-64")
        for part in layers_of(clip):
            for linear in linears_of(part):
                linear.__class__ = comfy.ops.manual_cast.Linear
                linear.to(request.param)
    with torch.inference_mode(False):
        yield ComfyBackbone(model, clip, vae)


def layers_of(clip) -> list[torch.nn.Module]:
    return [part for part in clip.cond_stage_model.modules() if type(part).__name__ == "CLIPLayer"]


def linears_of(layer) -> list[torch.nn.Module]:
    return [part for part in layer.modules() if isinstance(part, torch.nn.Linear)]


def encoded(backbone, bank) -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt's hidden states, and the gradient of some function of them for its learned words."""
    tokens = bank["rex"].tokens
    vectors = {name: vector.float().clone().requires_grad_() for name, vector in tokens.vectors.items()}
    with torch.enable_grad():
        hidden = encode_prompts(backbone, bank.vocabulary.parse_all([PROMPT]),
                                {"rex": TokenGroup(tokens.words, vectors)}).hidden
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
        (weights * hidden).sum().backward()
    return hidden.detach(), torch.cat([vector.grad.flatten() for vector in vectors.values()])


def state_of(clip) -> list[tuple]:
    layers = layers_of(clip)
    return [(layer.mlp.activation,
             [(one.weight.dtype, one.weight.detach().clone()) for one in linears_of(layer)])
            for layer in layers]


def same(one: list[tuple], other: list[tuple]) -> bool:
    return all(a is b
               and all(t is u and torch.equal(x, y) for (t, x), (u, y) in zip(mine, theirs, strict=True))
               for (a, mine), (b, theirs) in zip(one, other, strict=True))


def test_values_and_gradients_are_the_hosts(backbone, bank, monkeypatch):
    from continual_concepts.core.comfy import clip_gradients

    with backbone.training():
        assert all(layer.mlp.activation is quick_gelu for layer in layers_of(backbone.clip))
        assert all(one.weight.dtype == torch.float32 for layer in layers_of(backbone.clip)
                   for one in linears_of(layer))
        ours = encoded(backbone, bank)
    monkeypatch.setattr(clip_gradients, "quick_gelu", clip_gradients.ACTIVATIONS["quick_gelu"])
    monkeypatch.setattr(clip_gradients, "_cast_once", lambda _: clip_gradients._lean_activations(()))
    with backbone.training():
        theirs = encoded(backbone, bank)
    assert torch.equal(ours[0], theirs[0]) and theirs[1].any()
    assert torch.allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-5 * float(theirs[1].abs().max()))


@pytest.mark.parametrize("fails", [False, True])
def test_it_is_found_as_it_was(backbone, bank, fails):
    before = state_of(backbone.clip)
    try:
        with backbone.training():
            assert not same(before, state_of(backbone.clip))
            with backbone.training():      # a run within a run changes nothing
                encoded(backbone, bank)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert same(before, state_of(backbone.clip))


def test_weights_that_the_host_loads_anew_meanwhile_stay(backbone):
    linear = linears_of(layers_of(backbone.clip)[0])[0]
    before = linear.weight.dtype
    with backbone.training():
        loaded = torch.nn.Parameter(torch.full_like(linear.weight, 0.5, dtype=before), requires_grad=False)
        linear.weight = loaded
    assert linear.weight is loaded and linear.weight.dtype == before and (loaded == 0.5).all()


def test_another_activation_stays(backbone):
    mlp = layers_of(backbone.clip)[0].mlp
    mlp.activation = torch.nn.functional.gelu
    with backbone.training():
        assert mlp.activation is torch.nn.functional.gelu
    assert mlp.activation is torch.nn.functional.gelu

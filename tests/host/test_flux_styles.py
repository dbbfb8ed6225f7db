"""Low-rank concepts on Flux.1, Flux.2 Klein and Chroma: styles, and objects of the method `lora`. Their
deltas are parts of fused layers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from continual_concepts.core.attention.adapters import AdapterProcessor, LowRankAdapters
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.model.context import Context
from continual_concepts.core.model.deltas import LowRankDelta
from continual_concepts.core.model.sites import PROJECTIONS

from .joint_checks import deltas_act_alike_in_three_ways
from .make_flux import distance, model_and_clip, studio_of

pytestmark = pytest.mark.usefixtures("has_patches", "as_in_comfyui", "own_folder")
SCENE = "a photo of a meadow"


@pytest.fixture(scope="module", params=["flux", "klein", "chroma"])
def joint(request, pack, has_patches):
    with torch.inference_mode():
        studio = studio_of(pack, *model_and_clip(request.param))
        before = {name: weight.clone() for name, weight in studio.model.model.state_dict().items()}
        bank = studio.learn(name="ink", noun="drawing", kind="style", method="slots", steps=2,
                            preview_every=2)
        bank = studio.learn(name="spot", method="lora", steps=2, bank=[bank],
                            training_settings=[{"gradient_checkpointing": True}])
        bank = studio.learn(name="tom", noun="teddy bear", method="slots", steps=2, lr=0.3, bank=[bank])
    return SimpleNamespace(studio=studio, bank=bank, before=before, kind=request.param)


def test_learning_changes_nothing_of_the_users_objects(joint):
    assert {projection for _, projection in joint.bank["ink"].deltas} == set(PROJECTIONS)
    assert joint.bank["ink"].thumbnail and all(
        delta.up.abs().max() > 0 for name in ("ink", "spot") for delta in joint.bank[name].deltas.values())
    model, after = joint.studio.model, joint.studio.model.model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in joint.before.items())
    assert not any("forward" in module.__dict__ for module in model.model.modules())
    assert not model.patches


def test_prompts_without_the_style_are_plain_comfyui_bit_for_bit(joint):
    studio, bank = joint.studio, joint.bank
    plain = studio.ksampler(studio.model, SCENE, "bad")
    model, clip, positive = studio.aggregate(SCENE, bank)
    assert torch.equal(studio.ksampler(model, positive, studio.encode(clip, "bad")), plain)
    off, clip, positive = studio.aggregate("a <ink> of a meadow", bank, strength=0.0)
    drawing = studio.ksampler(studio.model, "a drawing drawing of a meadow", "bad")
    assert torch.equal(studio.ksampler(off, positive, studio.encode(clip, "bad")), drawing)
    for prompt in ("a <ink> of a meadow", "a photo of <spot>", "a <ink> of <tom>"):
        on, clip, positive = studio.aggregate(prompt, bank)
        changed = studio.ksampler(on, positive, studio.encode(clip, "bad"))
        assert torch.isfinite(changed).all() and distance(changed, plain) > 1e-3
    merged, clip, positive = studio.aggregate(SCENE, bank, mode="equal merge")
    assert distance(studio.ksampler(merged, positive, studio.encode(clip, "bad")), plain) > 1e-3
    assert torch.equal(studio.ksampler(studio.model, SCENE, "bad"), plain)


@pytest.fixture
def backbone(joint):
    from continual_concepts.core.comfy.backbone import ComfyBackbone

    return ComfyBackbone(joint.studio.model, joint.studio.clip, joint.studio.vae)


def inputs_of(backbone):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, backbone.latent_channels, 8, 6, generator=generator)
    text = torch.randn(1, 1, 7, backbone.unet.params.context_in_dim, generator=generator)
    return noise, torch.tensor([500]), Context(text)


def large(layout, size: float = 0.02):
    generator = torch.Generator().manual_seed(4)
    return {(site.index, name): LowRankDelta(size * torch.randn(site.shape(name)[0], 2, generator=generator),
                                             torch.randn(2, site.shape(name)[1], generator=generator))
            for site in layout.sites for name in PROJECTIONS}


def adapters_of(backbone, deltas, chosen=PROJECTIONS):
    adapters = LowRankAdapters(backbone.layout, 2, 1.0, torch.Generator().manual_seed(0), "cpu", chosen)
    adapters.load(deltas)
    return adapters


@pytest.mark.parametrize("chosen", [PROJECTIONS, *((name,) for name in PROJECTIONS)], ids=str)
def test_deltas_while_learning_are_patches_of_the_weights(joint, backbone, chosen):
    """Three ways to the same prediction: added to outputs, as adapters, and as the host's patches."""
    deltas = {key: delta for key, delta in large(backbone.layout).items() if key[1] in chosen}
    deltas_act_alike_in_three_ways(backbone, joint.studio.model, deltas,
                                   adapters_of(backbone, deltas, chosen), inputs_of(backbone))


def test_gradients_reach_all_factors(joint, backbone):
    """Along the gradient, against differences; also with recomputed blocks, one context after another."""
    found = []
    with torch.inference_mode(False), backbone.training():
        adapters, inputs = adapters_of(backbone, large(backbone.layout)), inputs_of(backbone)
        target = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(3))
        ups = list(adapters.up.values())

        def loss():
            return (backbone.predict(*inputs, AdapterProcessor(adapters)) * target).mean()

        for checkpointed in (False, True, False):
            with torch.enable_grad(), backbone.gradient_checkpointing(checkpointed):
                found.append(torch.autograd.grad(loss(), ups))
        assert all(gradient.abs().max() > 0 for gradient in found[0])
        norm = torch.stack([gradient.norm() for gradient in found[0]]).norm()
        values = []
        with torch.no_grad():
            for sign in (1.0, -2.0):
                for up, gradient in zip(ups, found[0], strict=True):
                    up += sign * 1e-2 * gradient / norm
                values.append(loss())
    assert norm.item() == pytest.approx((values[0] - values[1]).item() / 2e-2, rel=0.02)
    for other in found[1:]:
        assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-3) for a, b in zip(other, found[0], strict=True))


def test_a_style_of_the_scene_acts_in_all_regions(joint):
    studio, bank = joint.studio, joint.bank
    region = [studio.region("a photo of <tom>")]
    plain = studio.regional(SCENE, region, bank)
    styled = studio.regional("a <ink> of a meadow", region, bank)
    assert torch.isfinite(styled).all() and distance(styled, plain) > 1e-3
    named = studio.regional("a <ink> of a meadow", [studio.region("a <ink> of <tom>")], bank)
    assert torch.isfinite(named).all()
    with pytest.raises(ConceptError, match="region 'a <ink> of <tom>' names a concept that acts on"):
        studio.regional(SCENE, [studio.region("a <ink> of <tom>")], bank)
    with pytest.raises(ConceptError, match="the negative prompt names <ink>"):
        studio.regional(SCENE, region, bank, negative_scene="<ink>")


def test_exports_are_refused(joint, tmp_path):
    from continual_concepts.core.interop.export import export_concept

    with pytest.raises(ConceptError, match="joint attention.*files for other programs is not supported"):
        export_concept(joint.bank, "ink", tmp_path)

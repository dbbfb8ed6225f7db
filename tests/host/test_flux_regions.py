"""Regions on Flux.1, Flux.2 Klein and Chroma: every region reads its own prompt, and a concept acts in its
box alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from continual_concepts.core.errors import ConceptError

from .make_flux import distance, model_and_clip, studio_of

pytestmark = pytest.mark.usefixtures("has_patches", "as_in_comfyui", "own_folder")
SCENE = "a meadow"
BEARS = "teddy bear teddy bear teddy bear teddy bear"      # what stands for an object of four words


@pytest.fixture(scope="module", params=["flux", "klein", "chroma"])
def joint(request, pack, has_patches):
    with torch.inference_mode():
        studio = studio_of(pack, *model_and_clip(request.param))
        bank = studio.learn(method="slots", steps=2, lr=0.3)
        bank = studio.learn(method="slots", steps=2, lr=0.3, name="tom", noun="teddy bear", bank=[bank])
        plain = studio.ksampler(studio.model, SCENE, "")
    return SimpleNamespace(studio=studio, bank=bank, kind=request.param, plain=plain)


@pytest.mark.parametrize("settings", [{}, {"solo": 1.0}, {"isolation": 1.0}], ids=str)
@pytest.mark.parametrize("prompt", ["a photo of a dog in the snow", "a photo of <tom> in the snow"])
def test_a_region_over_the_whole_picture_is_its_prompt(joint, prompt, settings):
    studio = joint.studio
    model, clip, positive = studio.aggregate(prompt, joint.bank)
    expected = studio.ksampler(model, positive, studio.encode(clip, ""))
    found = studio.regional(SCENE, [studio.region(prompt)], joint.bank, **settings)
    assert distance(found, expected) < 1e-3 < 1e-2 < distance(joint.plain, expected)


def boxes(joint, right: str, **settings):
    studio = joint.studio
    regions = [studio.region("a photo of <spot>", right=0.5), studio.region(right, left=0.5)]
    return studio.regional(SCENE, regions, joint.bank, **settings)


def test_two_concepts_in_two_boxes(joint):
    """The text of both right regions is the same, so that they only differ by the concept."""
    both, one = boxes(joint, "a photo of <tom>"), boxes(joint, f"a photo of {BEARS}")
    half = both.shape[-1] // 2
    assert torch.isfinite(both).all()
    left, right = distance(both[..., :half], one[..., :half]), distance(both[..., half:], one[..., half:])
    assert right > 1e-3 and right > 2 * left
    both, one = (boxes(joint, text, steps=1, isolation=1.0)
                 for text in ("a photo of <tom>", f"a photo of {BEARS}"))
    assert distance(both[..., :half], one[..., :half]) < 1e-6
    assert distance(both[..., half:], one[..., half:]) > 1e-3


def test_a_scene_names_a_concept_and_no_region_does(joint):
    studio = joint.studio
    region = [studio.region("a photo of a dog", right=0.5)]
    found = studio.regional("a photo of <tom>", region, joint.bank, steps=2)
    plain = studio.regional(f"a photo of {BEARS}", region, joint.bank, steps=2)
    assert torch.isfinite(found).all() and distance(found, plain) > 1e-3


def test_a_negative_prompt_that_another_node_sets_to_zero_acts_in_regions_as_without(joint):
    studio = joint.studio
    model, clip, positive = studio.aggregate("a photo of <tom>", joint.bank)
    zero = studio.stock.ConditioningZeroOut().zero_out(studio.encode(clip, ""))[0]
    regions = [studio.region("a photo of <tom>")]
    applied = studio.apply_regions(regions, studio.encode(clip, SCENE), zero, model, clip)
    assert distance(studio.ksampler(*applied), studio.ksampler(model, positive, zero)) < 1e-3


@pytest.mark.parametrize("settings", [{"solo": 0.7}, {"region_noise": True}, {"overlap": "priority"}],
                         ids=str)
def test_other_settings_of_regions(joint, settings):
    found = boxes(joint, "a photo of <tom>", **settings)
    assert torch.isfinite(found).all()
    if "overlap" not in settings:
        assert distance(found, boxes(joint, "a photo of <tom>")) > 1e-3


def test_apply_regions_gives_any_sampler_the_same(joint):
    studio = joint.studio
    model, clip, _ = studio.aggregate("", joint.bank)
    regions = [studio.region("a photo of <spot>", right=0.5), studio.region("a photo of <tom>", left=0.5)]
    applied = studio.apply_regions(regions, studio.encode(clip, SCENE), studio.encode(clip, ""), model, clip)
    assert distance(studio.ksampler(*applied), boxes(joint, "a photo of <tom>")) < 1e-4
    assert torch.equal(studio.ksampler(studio.model, SCENE, ""), joint.plain)


def test_no_region_and_strength_zero_are_plain_comfyui_bit_for_bit(joint):
    studio = joint.studio
    off = [studio.region("a photo of <spot>", strength=0.0)]
    assert torch.equal(studio.regional(SCENE, off, joint.bank), joint.plain)
    assert torch.equal(studio.regional(SCENE, [], joint.bank), joint.plain)


def test_finding_regions_is_refused(joint):
    with pytest.raises(ConceptError, match="joint attention.*finding regions is not supported"):
        joint.studio.regional("<spot> and <tom>", [], joint.bank, find_regions=True)

"""The backbone of a transformer with joint attention: fused projections, slots, texts, and its base file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from continual_concepts.core.attention.adapters import AdapterProcessor, LowRankAdapters
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.prompts import NO_CONCEPTS
from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.model.processor import AttentionProcessor
from continual_concepts.core.model.sites import PROJECTIONS
from continual_concepts.core.regional.noise import NoiseSettings
from continual_concepts.core.regional.regions import Region
from continual_concepts.core.sampling.found import sample_found
from continual_concepts.core.sampling.regions import sample_regions
from continual_concepts.core.sampling.sampling import sample
from continual_concepts.core.sampling.settings import SampleSettings

QUICK = SampleSettings(steps=3, cfg=2.0, size=(32, 32))
LONG = "a photo of a dog on a beach with a red hat beside a house in the snow"      # two chunks of tokens


def inputs(backbone, *prompts):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    texts = encode_prompts(backbone, NO_CONCEPTS.parse_all(prompts or ("a red dog", "a cat")), {})
    return latents, torch.tensor([10, 700]), texts


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def adapters(tiny_joint):
    """Low-rank deltas of all projections that are not zero."""
    generator = torch.Generator().manual_seed(0)
    deltas = LowRankAdapters(tiny_joint.layout, 2, 1.0, generator, "cpu")
    for up in deltas.up.values():
        up.data = 0.3 * torch.randn(up.shape, generator=generator)
    return deltas.requires_grad_(False)


@torch.no_grad()
def test_it_is_the_model_itself_and_a_processor_that_changes_nothing_changes_nothing(tiny_joint):
    latents, timesteps, context = inputs(tiny_joint)
    times = tiny_joint.schedule.sigmas[timesteps]
    expected = tiny_joint.denoiser(latents, times, context.hidden[:, 0])
    assert expected.any() and torch.equal(tiny_joint.predict(latents, timesteps, context), expected)
    assert distance(tiny_joint.predict(latents, timesteps, context, AttentionProcessor()), expected) < 1e-5


def test_a_processor_sees_all_projections_of_fused_layers(tiny_joint):
    seen = []

    class Recorder(AttentionProcessor):
        def project(self, site, projection, x, y):
            assert (y.shape[-1], x.shape[-1]) == site.shape(projection)
            weight = tiny_joint.weight(site, projection)
            if not (site.name.startswith("single") and projection == "to_out"):      # one of two summands
                assert torch.allclose(y, x @ weight.T, atol=1e-5)
            seen.append((site.name, projection))
            return y

    tiny_joint.predict(*inputs(tiny_joint), Recorder())
    assert sorted(seen) == sorted((site.name, p) for site in tiny_joint.layout.sites for p in PROJECTIONS)


@torch.no_grad()
def test_folded_deltas_act_as_in_a_processor_and_are_taken_out_again(tiny_joint, adapters):
    latents, timesteps, context = inputs(tiny_joint)
    plain = tiny_joint.predict(latents, timesteps, context)
    expected = tiny_joint.predict(latents, timesteps, context, AdapterProcessor(adapters))
    with tiny_joint.folded(adapters.deltas()):
        folded = tiny_joint.predict(latents, timesteps, context)
    assert distance(folded, expected) < 1e-5 < 0.01 < distance(expected, plain)
    assert torch.equal(tiny_joint.predict(latents, timesteps, context), plain)


def test_gradients_are_the_same_with_checkpointing(tiny_joint, adapters):
    adapters.requires_grad_(True)
    found = []
    for enabled in (False, True):
        with tiny_joint.gradient_checkpointing(enabled):
            tiny_joint.predict(*inputs(tiny_joint), AdapterProcessor(adapters)).square().mean().backward()
        found.append([up.grad.clone() for up in adapters.up.values()])
        adapters.zero_grad()
    assert all(torch.allclose(*pair, atol=1e-7) and pair[0].any() for pair in zip(*found, strict=True))


@pytest.fixture(scope="module")
def two(tiny_joint, teach_two):
    """A bank with two objects."""
    return teach_two(tiny_joint, "slots")


def test_two_concepts_are_learned_and_drawn_and_leave_other_prompts_alone(tiny_joint, two):
    texts = ["a dog", "a photo of <rex>", "a photo of <mimi>", "a photo of <rex> and <mimi>"]
    pictures, empty = sample(tiny_joint, two, texts, [0] * 4, QUICK), ConceptBank(tiny_joint.layout)
    assert torch.equal(pictures[:1], sample(tiny_joint, empty, texts[:1], [0], QUICK))
    assert torch.isfinite(pictures).all()
    assert all(distance(pictures[i], pictures[k]) > 1e-3 for i in range(4) for k in range(i))


def test_a_style_is_learned_as_deltas_of_fused_layers(tiny_joint, teach):
    bank = teach(tiny_joint, ConceptBank(tiny_joint.layout), "chalk", "slots", {"lr": 0.1}, noun="drawing",
                 kind="style", steps=3).bank
    plain, styled = sample(tiny_joint, bank, ["drawing of a dog", "<chalk> of a dog"], [0, 0], QUICK)
    assert distance(styled, plain) > 1e-3


def test_what_needs_a_softmax_of_the_text_alone_is_refused(tiny_joint, two):
    with pytest.raises(ConceptError, match="finding regions is not supported"):
        sample_found(tiny_joint, two, "a photo of <rex> and <mimi>", [0], QUICK)
    with pytest.raises(ConceptError, match="attention guidance is not supported"):
        sample(tiny_joint, two, ["a photo of <rex> and <mimi>"], [0], replace(QUICK, artists=1.0))


def test_text_cannot_be_projected_alone(tiny_joint):
    with pytest.raises(ConceptError, match="projecting text is not supported"):
        tiny_joint.project(tiny_joint.layout.sites[0], "to_k", torch.zeros(1, 32))


@pytest.mark.parametrize("settings", [QUICK, replace(QUICK, negative=LONG), replace(QUICK, cfg=1.0)])
def test_a_picture_does_not_depend_on_longer_prompts_beside_it(tiny_joint, two, settings):
    texts = ["a dog", LONG, ""]
    together = sample(tiny_joint, two, texts, [0, 1, 2], settings)
    for i, text in enumerate(texts):
        assert distance(together[i:i + 1], sample(tiny_joint, two, [text], [i], settings)) < 1e-4


@pytest.mark.parametrize("prompt", ["a photo of a dog", LONG, "<mimi>"])
def test_a_region_over_the_whole_picture_is_its_prompt_whatever_the_scene_names(tiny_joint, two, prompt):
    region = Region(prompt, box=(0.0, 0.0, 1.0, 1.0))
    expected = sample(tiny_joint, two, [prompt], [3], QUICK)
    for scene in ("a photo of <rex>", LONG):
        assert distance(sample_regions(tiny_joint, two, scene, [region], [3], QUICK), expected) < 1e-3


@pytest.mark.parametrize("noise", [NoiseSettings(), NoiseSettings(crop_denoising=0.5), NoiseSettings(True)])
def test_two_concepts_in_two_boxes(tiny_joint, two, noise):
    settings = SampleSettings(steps=3, cfg=2.0, size=(32, 32), noise=noise)
    regions = [Region(f"a photo of <{name}>", box=box)
               for name, box in (("rex", (0.0, 0.0, 1.0, 0.5)), ("mimi", (0.0, 0.5, 1.0, 1.0)))]
    pictures = [sample_regions(tiny_joint, two, "a photo of a meadow", chosen, [3], settings)
                for chosen in (regions, regions[:1], regions[::-1])]
    assert all(torch.isfinite(picture).all() for picture in pictures)
    assert distance(pictures[0], pictures[1]) > 1e-3
    assert distance(pictures[0], pictures[2]) < 1e-4      # their order means nothing


def test_a_region_with_strength_zero_leaves_the_scene(tiny_joint, two):
    region = Region("a photo of <rex>", box=(0.0, 0.0, 1.0, 0.5), strength=0.0)
    scene = sample(tiny_joint, two, ["a photo of a meadow"], [3], QUICK)
    drawn = sample_regions(tiny_joint, two, "a photo of a meadow", [region], [3], QUICK)
    assert distance(drawn, scene) < 1e-4


def test_a_style_that_only_a_region_names_is_refused(tiny_joint, two, teach):
    bank = teach(tiny_joint, two, "chalk", "slots", {"lr": 0.1}, noun="drawing", kind="style", steps=3).bank
    region = Region("<chalk> of a dog", box=(0.0, 0.0, 1.0, 0.5))
    with pytest.raises(ConceptError, match="names a concept that acts on the whole picture"):
        sample_regions(tiny_joint, bank, "a meadow", [region], [3], QUICK)
    styled = sample_regions(tiny_joint, bank, "<chalk> of a meadow", [region], [3], QUICK)
    assert distance(styled, sample_regions(tiny_joint, bank, "a meadow",
                                           [Region("a dog", box=region.box)], [3], QUICK)) > 1e-3


def test_a_style_that_only_the_negative_prompt_names_is_refused(tiny_joint, two, teach):
    """Its deltas act on every row, the picture's, too, so that they have no place in one half of guidance."""
    bank = teach(tiny_joint, two, "chalk", "slots", {"lr": 0.1}, noun="drawing", kind="style", steps=3).bank
    negative, regions = replace(QUICK, negative="<chalk>"), [Region("a dog", box=(0.0, 0.0, 1.0, 0.5))]
    for draw in (lambda: sample(tiny_joint, bank, ["a meadow"], [3], negative),
                 lambda: sample_regions(tiny_joint, bank, "a meadow", regions, [3], negative),
                 lambda: sample_regions(tiny_joint, bank, "a meadow",
                                        [replace(regions[0], negative="<chalk>")], [3], QUICK)):
        with pytest.raises(ConceptError, match="negative prompt names <chalk>, which acts on every word"):
            draw()
    for picture in (sample(tiny_joint, bank, ["<chalk> of a meadow"], [3], negative),
                    sample_regions(tiny_joint, bank, "<chalk> of a meadow", regions, [3], negative)):
        assert picture.isfinite().all()

"""The backbone of a diffusion transformer: sites, norms of queries and keys, regions, and its base file."""

from __future__ import annotations

import json

import pytest
import torch

from continual_concepts.core.attention.adapters import AdapterProcessor, LowRankAdapters
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.prompts import NO_CONCEPTS
from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.demo import base
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.hosts.transformer import TransformerBackbone
from continual_concepts.core.model.processor import AttentionProcessor
from continual_concepts.core.model.sites import PROJECTIONS
from continual_concepts.core.regional.noise import NoiseSettings
from continual_concepts.core.regional.processor import Part, RegionProcessor
from continual_concepts.core.regional.regions import Region
from continual_concepts.core.sampling.regions import sample_regions
from continual_concepts.core.sampling.sampling import sample
from continual_concepts.core.sampling.settings import SampleSettings

QUICK = SampleSettings(steps=3, cfg=2.0, size=(32, 32))
HALVES = ((0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0))      # top, left, bottom, right


def texts(backbone, *prompts):
    return encode_prompts(backbone, NO_CONCEPTS.parse_all(prompts), {})


def inputs(backbone, seed=0):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return latents, torch.tensor([10, 700]), texts(backbone, "a red dog", "a cat")


def adapters(backbone, seed=0):
    """Low-rank deltas of all projections that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    deltas = LowRankAdapters(backbone.layout, 2, 1.0, generator, "cpu")
    for up in deltas.up.values():
        up.data = 0.3 * torch.randn(up.shape, generator=generator)
    return deltas.requires_grad_(False)


@pytest.fixture(scope="module")
def bank(tiny_transformer, teach_two):
    """Two concepts of `lora`, which acts on all four projections of every word."""
    return teach_two(tiny_transformer, "lora")


@torch.no_grad()
def test_it_is_the_model_itself_bit_for_bit(tiny_transformer):
    latents, timesteps, context = inputs(tiny_transformer)
    times = 1000 * tiny_transformer.schedule.sigmas[timesteps]
    expected = tiny_transformer.denoiser(latents, times, context.hidden[:, 0])
    assert torch.equal(tiny_transformer.predict(latents, timesteps, context), expected) and expected.any()
    neutral = tiny_transformer.predict(latents, timesteps, context, AttentionProcessor())
    assert torch.equal(neutral, expected)


def test_sites_run_in_the_order_of_their_numbers(tiny_transformer):
    seen = []

    class Recorder(AttentionProcessor):
        def project(self, site, projection, x, y):
            assert torch.equal(y, tiny_transformer.project(site, projection, x))
            assert (y.shape[-1], x.shape[-1]) == site.shape(projection)
            seen.append((site.index, projection))
            return y

    tiny_transformer.predict(*inputs(tiny_transformer), Recorder())
    assert seen == [(site.index, p) for site in tiny_transformer.layout.sites for p in PROJECTIONS]
    assert tiny_transformer.layout.copies == 1


def test_queries_and_keys_are_normalised_between_project_and_attend(tiny_transformer):
    projected, checked = {}, []

    class Check(AttentionProcessor):
        def project(self, site, projection, x, y):
            projected[projection] = y
            return y

        def attend(self, call, query, key, value, attention):
            site = call.site
            for name, ours in (("to_q", query), ("to_k", key)):
                assert torch.equal(ours, tiny_transformer.normalised(site, name, projected[name]))
                norm = tiny_transformer.denoiser.get_submodule(f"{site.name}.{name[-1]}_norm")
                size = (ours.unflatten(-1, (site.heads, -1)) / norm.weight).square().mean(-1)
                assert torch.allclose(size, torch.ones_like(size), atol=1e-3)
            assert torch.equal(call.before_norm(query), projected["to_q"])
            assert torch.equal(value, projected["to_v"])
            checked.append(site.index)
            return attention(query, key, value)

    tiny_transformer.predict(*inputs(tiny_transformer), Check())
    assert checked == [0, 1, 2]


@torch.no_grad()
def test_folded_deltas_equal_added_ones_and_leave_the_weights_bit_for_bit(tiny_transformer):
    before = {name: p.clone() for name, p in tiny_transformer.denoiser.named_parameters()}
    arguments, own = inputs(tiny_transformer), adapters(tiny_transformer)
    plain, added = (tiny_transformer.predict(*arguments, processor)
                    for processor in (None, AdapterProcessor(own)))
    with tiny_transformer.folded(own.deltas()):
        folded = tiny_transformer.predict(*arguments)
    assert torch.allclose(folded, added, atol=1e-4) and (folded - plain).abs().max() > 0.1
    assert all(torch.equal(p, before[name]) for name, p in tiny_transformer.denoiser.named_parameters())


def test_recomputed_blocks_give_the_same_gradient(tiny_transformer):
    gradients = []
    for enabled in (False, True):
        own = adapters(tiny_transformer).requires_grad_(True)
        with tiny_transformer.gradient_checkpointing(enabled):
            tiny_transformer.predict(*inputs(tiny_transformer),
                                     AdapterProcessor(own)).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in own.parameters()]))
    assert torch.allclose(*gradients, atol=1e-7) and gradients[0].any()


@torch.no_grad()
def test_sides_that_are_no_multiple_of_a_patch_keep_their_size(tiny_transformer):
    latents, timesteps, context = inputs(tiny_transformer)
    latents = latents[..., :7, :5]
    assert tiny_transformer.predict(latents, timesteps, context).shape == latents.shape


@pytest.mark.parametrize("feather", [0.0, 0.1])
def test_regions_with_the_scenes_prompt_change_nothing(tiny_transformer, bank, feather):
    """Also with deltas of to_q, which act before the norm: as in a prompt, where they are folded."""
    prompt = "a photo of <rex>"
    regions = [Region(prompt, box=box, feather=feather) for box in HALVES]
    ours = sample_regions(tiny_transformer, bank, prompt, regions, [3, 4], QUICK)
    assert torch.allclose(ours, sample(tiny_transformer, bank, [prompt] * 2, [3, 4], QUICK), atol=1e-3)
    base_picture = sample(tiny_transformer, bank, ["a photo of dog dog"], [3], QUICK)
    assert (ours[:1] - base_picture).abs().max() > 0.05


@torch.no_grad()
def test_isolated_regions_do_not_see_each_other(tiny_transformer):
    context = texts(tiny_transformer, "", "a dog")
    parts, rows = [Part(context, {}), Part(context, {})], torch.tensor([0, 1])
    regions, other = [Region("a dog", box=box) for box in HALVES], inputs(tiny_transformer, 1)[0]
    latents, timesteps, _ = inputs(tiny_transformer)
    changed = torch.cat([latents[..., :4], other[..., 4:]], -1)
    for isolation in (1.0, 0.0):
        processor = RegionProcessor(tiny_transformer, parts[0], regions, parts, rows, (8, 8),
                                    isolation=isolation)
        first, second = (tiny_transformer.predict(x, timesteps, context, processor)[..., :4]
                         for x in (latents, changed))
        assert torch.allclose(first, second, atol=1e-5) == (isolation == 1.0)


def test_crop_denoising_and_region_noise_run(tiny_transformer, bank):
    regions = [Region(f"a photo of <{name}>", box=box) for name, box in zip(bank.names, HALVES, strict=True)]
    plain = sample_regions(tiny_transformer, bank, "a photo", regions, [3], QUICK)
    for noise in (NoiseSettings(crop_denoising=0.4), NoiseSettings(True), NoiseSettings(True, area="crop")):
        settings = SampleSettings(steps=3, cfg=2.0, size=(32, 32), noise=noise)
        picture = sample_regions(tiny_transformer, bank, "a photo", regions, [3], settings)
        assert torch.isfinite(picture).all() and not torch.equal(picture, plain)


def test_a_transformer_base_says_that_it_is_a_transformer(transformer_base):
    backbone = base.load_base(transformer_base)
    assert isinstance(backbone, TransformerBackbone) and backbone.picture_size == 32
    assert [site.name for site in backbone.layout.sites] == ["blocks.0.cross_attn", "blocks.1.cross_attn"]
    assert torch.isclose(backbone.schedule.sigmas[499], torch.tensor(2 / 3)) and backbone.latent_channels == 6
    picture = sample(backbone, ConceptBank(backbone.layout), ["a photo of a dog"], [0], QUICK)
    assert picture.shape == (1, 3, 32, 32) and len(backbone.known_prompts) == 32


def test_a_transformer_runs_in_float32_only(transformer_base):
    with pytest.raises(ConceptError, match=r"torch.float16 was asked .* allowed: torch.float32"):
        base.load_base(transformer_base, dtype=torch.float16)


@pytest.mark.parametrize("kind, name, sites", [("transformer", "embedded-dit", 10),
                                               ("joint", "embedded-joint", 9)])
def test_a_base_of_the_true_shape_names_itself(kind, name, sites):
    from continual_concepts.benchmarks.pretraining.export_128 import header

    sizes = json.loads(json.dumps(header(kind)))
    backbone = base.as_backbone(base.build_modules(sizes), sizes)
    assert backbone.layout.embedded_base == name and len(backbone.layout) == sites
    assert backbone.picture_size == 128 and backbone.picture_multiple == 8

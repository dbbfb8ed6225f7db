"""The same weights, latents and concept give the same prediction in ComfyUI and in the diffusers host."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.conditioning.routing import aggregate
from continual_concepts.core.regional.processor import Part, RegionProcessor
from continual_concepts.core.regional.regions import Region

TOLERANCE = 1e-4
PROMPTS = ["a photo of a red dog on a beach", "a photo of <rex> in a meadow",
           "<blueprint> of a car, <mimi> at night"]


@pytest.fixture
def backbone(demo):
    from continual_concepts.core.comfy.backbone import ComfyBackbone

    return ComfyBackbone(*demo)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def noisy(host, count: int = 2):
    noise = torch.randn(count, host.latent_channels, 16, 16, generator=torch.Generator().manual_seed(5))
    return noise, torch.tensor([120, 700])[:count]


def encoded(host, bank, prompt):
    names = bank.vocabulary.parse(prompt).concepts
    return encode_prompts(host, bank.vocabulary.parse_all([prompt] * 2),
                          {name: bank[name].tokens for name in names})


def test_layout_schedule_and_fingerprint_are_the_same(backbone, reference):
    assert backbone.layout == reference.layout and backbone.fingerprint == reference.fingerprint
    assert backbone.schedule.prediction == reference.schedule.prediction
    assert torch.allclose(backbone.schedule.alphas_cumprod, reference.schedule.alphas_cumprod, rtol=1e-5)


def test_pictures_to_latents_and_back(backbone, reference):
    side = reference.picture_size
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = reference.encode_images(x)
    assert distance(backbone.encode_images(x), latents) < TOLERANCE
    assert distance(backbone.decode_latents(latents), reference.decode_latents(latents)) < TOLERANCE


@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_prompts_and_predictions(backbone, reference, bank, prompt):
    ours, theirs = encoded(backbone, bank, prompt), encoded(reference, bank, prompt)
    assert distance(ours.hidden, theirs.hidden) < TOLERANCE and ours.words == theirs.words
    deltas = aggregate(reference, bank, bank.parse(prompt)).deltas
    with backbone.folded(deltas), reference.folded(deltas):
        outputs = [host.predict(*noisy(host), context)
                   for host, context in ((backbone, ours), (reference, theirs))]
        assert distance(*outputs) < TOLERANCE


@pytest.mark.parametrize("mode", ["paper", "released", "equal"])
def test_aggregation_weights(backbone, reference, bank, mode):
    ours, theirs = (aggregate(host, bank, bank.parse(PROMPTS[2]), mode) for host in (backbone, reference))
    assert torch.allclose(ours.weights, theirs.weights, atol=1e-4)


@pytest.mark.parametrize("prompt", PROMPTS[:2])
def test_learning_takes_an_attention_that_has_a_gradient(backbone, bank, prompt, monkeypatch):
    """Whatever the host was started with; and it computes the same."""
    import comfy.ldm.modules.attention as attention

    from continual_concepts.core.comfy import sites

    hosts, called = attention.optimized_attention, []

    def without_gradient(q, k, v, heads, *args, **kwargs):
        called.append(torch.is_grad_enabled())
        return hosts(q.detach(), k.detach(), v.detach(), heads, *args, **kwargs)

    def overridden(q, *args, **kwargs):
        own = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
        if own is None:
            return without_gradient(q, *args, **kwargs)
        return own(without_gradient, q, *args, **kwargs)

    with backbone.training():
        context = encoded(backbone, bank, prompt)
        with torch.no_grad():
            expected = backbone.predict(*noisy(backbone), context)
        monkeypatch.setattr(attention, "optimized_attention", overridden)
        monkeypatch.setattr(sites, "optimized_attention", without_gradient)
        hidden = context.hidden.detach().requires_grad_()
        found = backbone.predict(*noisy(backbone), replace(context, hidden=hidden))
        found.sum().backward()
        assert not called and hidden.grad.abs().sum() > 0
        assert distance(found.detach(), expected) < TOLERANCE
        with torch.no_grad():
            backbone.predict(*noisy(backbone), context)
        assert called      # a host's choice where nothing is learned


@torch.no_grad()
def test_regions(backbone, reference, bank):
    regions = [Region("<rex>", box=(0.0, 0.0, 1.0, 0.5)), Region("<mimi>", box=(0.3, 0.4, 0.9, 1.0))]
    results = []
    for host in (backbone, reference):
        parts = [Part(encoded(host, bank, region.prompt), bank[region.prompt[1:-1]].deltas)
                 for region in regions]
        scene = Part(encoded(host, bank, "a photo in a meadow"), {})
        processor = RegionProcessor(host, scene, regions, parts, torch.tensor([0, 1]), (16, 16))
        results.append(host.predict(*noisy(host), scene.context, processor))
    plain = reference.predict(*noisy(reference), encoded(reference, bank, "a photo in a meadow"))
    assert distance(*results) < TOLERANCE < distance(results[0], plain)


def test_the_hosts_weights_are_what_they_were(backbone, bank):
    before = {name: w.clone() for name, w in backbone.unet.state_dict().items()}
    with backbone.folded(aggregate(backbone, bank, bank.parse("<rex>")).deltas):
        assert any(not torch.equal(before[name], w) for name, w in backbone.unet.state_dict().items())
    assert all(torch.equal(before[name], w) for name, w in backbone.unet.state_dict().items())

"""The backbone over diffusers: our attention processors leave the model as it was, SDXL's shapes included."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.prompts import Vocabulary
from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.hosts.quick_gelu import quick_gelu
from continual_concepts.core.model.context import Context
from continual_concepts.core.model.processor import AttentionProcessor
from continual_concepts.core.model.sites import PROJECTIONS
from continual_concepts.core.sampling.sampling import sample
from continual_concepts.core.sampling.settings import SampleSettings


@pytest.fixture(params=["tiny_backbone", "tiny_sdxl"])
def backbone(request):
    return request.getfixturevalue(request.param)


def inputs(backbone, seed=0):
    g = torch.Generator().manual_seed(seed)
    context = encode_prompts(backbone, Vocabulary([]).parse_all(["a red dog", "a cat"]), {})
    return torch.randn(2, 4, 8, 8, generator=g), torch.tensor([10, 700]), context


def test_without_an_attention_processor_it_is_the_model_itself(backbone):
    latents, timesteps, context = inputs(backbone)
    ours, unet = backbone.predict(latents, timesteps, context), backbone.unet
    extra = {} if context.pooled is None else {"text_embeds": context.pooled,
                                               "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)}
    processors = dict(unet.attn_processors)
    try:
        unet.set_attn_processor(AttnProcessor2_0())
        with torch.no_grad():
            expected = unet(latents, timesteps, context.hidden[:, 0], added_cond_kwargs=extra).sample
    finally:
        unet.set_attn_processor(processors)
    assert torch.allclose(ours, expected, atol=1e-5)
    assert torch.allclose(backbone.predict(latents, timesteps, context, AttentionProcessor()), expected,
                          atol=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_texts_are_encoded_with_our_activation_and_the_model_keeps_its_own(tiny_backbone, fails):
    encoder, seen = tiny_backbone.text[0], []
    activations = [part for part in encoder.model.modules() if type(part).__name__ == "QuickGELUActivation"]
    ids = torch.tensor([[encoder.start, 5, *[encoder.end] * (encoder.length - 2)]])
    nothing, vectors = torch.zeros(ids.shape, dtype=torch.bool), torch.zeros(0, encoder.width)
    with torch.no_grad():
        expected = encoder.model(ids).last_hidden_state

    def watch(*_):
        seen.extend(part.forward is quick_gelu for part in activations)
        if fails:
            raise KeyboardInterrupt

    hook = encoder.embedding.register_forward_hook(watch)
    try:
        with torch.no_grad():
            assert torch.equal(encoder.encode(ids, nothing, vectors)[0], expected)
    except KeyboardInterrupt:
        assert fails
    finally:
        hook.remove()
    assert seen == [True] * len(activations) != []
    assert not any("forward" in part.__dict__ for part in activations)


def test_sites_run_in_the_order_of_their_numbers(backbone):
    class Recorder(AttentionProcessor):
        def __init__(self):
            self.seen, self.begun = [], 0

        def prepare(self, context):
            self.begun += 1

        def project(self, site, projection, x, y):
            assert (y.shape[-1], x.shape[-1]) == site.shape(projection)
            self.seen.append((site.index, projection))
            return y

    processor = Recorder()
    backbone.predict(*inputs(backbone), processor)
    assert processor.seen == [(site.index, p) for site in backbone.layout.sites for p in PROJECTIONS]
    assert processor.begun == 1


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_an_attention_processor_sees_what_project_computes(backbone, projection):
    class Check(AttentionProcessor):
        def project(self, site, name, x, y):
            if name == projection:
                assert torch.equal(y, backbone.project(site, name, x))
            return -3.0 * y if name == projection else y

    arguments = inputs(backbone)
    assert not torch.allclose(backbone.predict(*arguments, Check()), backbone.predict(*arguments), atol=1e-4)


def test_copies_are_per_site_up_to_16_and_per_group_above(tiny_backbone, tiny_sdxl):
    first, second = tiny_backbone.layout, tiny_sdxl.layout
    assert [site.copy for site in first.sites] == list(range(7)) and first.copies == 7
    assert [site.copy for site in second.sites] == [i // 3 for i in range(21)] and second.copies == 7
    assert tiny_sdxl.layout.text_widths == (("clip_l", 32), ("clip_g", 24))
    assert tiny_backbone.layout.fingerprint != tiny_sdxl.layout.fingerprint
    names = [site.name.split(".")[0] for site in tiny_sdxl.layout.sites]
    assert names == sorted(names, key=["down_blocks", "mid_block", "up_blocks"].index)


def test_each_site_reads_its_layer_copy(backbone):
    latents, timesteps, context = inputs(backbone)
    base = backbone.predict(latents, timesteps, context)
    layered = context.hidden.repeat(1, backbone.layout.copies, 1, 1)
    assert torch.allclose(backbone.predict(latents, timesteps, Context(layered, context.pooled)), base,
                          atol=1e-5)
    for copy in range(backbone.layout.copies):
        changed = layered.clone()
        changed[:, copy] += 1.0
        assert not torch.allclose(backbone.predict(latents, timesteps, Context(changed, context.pooled)),
                                  base, atol=1e-4), copy


def test_pooled_text_reaches_the_unet(tiny_sdxl):
    latents, timesteps, context = inputs(tiny_sdxl)
    other = Context(context.hidden, context.pooled + 1.0)
    assert not torch.allclose(tiny_sdxl.predict(latents, timesteps, other),
                              tiny_sdxl.predict(latents, timesteps, context), atol=1e-3)


def test_sdxl_learns_and_samples(tiny_sdxl, teach):
    learned = teach(tiny_sdxl, ConceptBank(tiny_sdxl.layout), steps=2)
    shapes = {name: tuple(v.shape) for name, v in learned.concept.tokens.vectors.items()}
    assert shapes == {"clip_l": (7, 2, 32), "clip_g": (7, 2, 24)}
    settings = SampleSettings(steps=1, size=(32, 32))
    named, base = sample(tiny_sdxl, learned.bank, ["<rex>", "a dog"], [1, 1], settings)
    assert torch.isfinite(named).all() and not torch.allclose(named, base, atol=1e-4)


def test_latents_have_the_advertised_shape_and_scale(tiny_backbone):
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = tiny_backbone.encode_images(images)
    assert latents.shape == (2, 4, 8, 12)
    with torch.no_grad():
        assert torch.allclose(latents, tiny_backbone.vae.encode(images).latent_dist.mean * 0.5, atol=1e-6)
    decoded = tiny_backbone.decode_latents(latents * 100)
    assert decoded.shape == images.shape and decoded.abs().max() <= 1


def test_training_is_allowed_and_weights_are_counted(backbone):
    with backbone.training():
        assert backbone.parameter_count == sum(weight.numel() for weight in backbone.unet.parameters()) > 0

"""Krea 2 with random weights: what the model predicts with concepts, in batches, and the gradients of it."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.attention.adapters import LowRankAdapters
from continual_concepts.core.attention.token_lora import TokenLora, TokenLoraProcessor
from continual_concepts.core.model.context import Context
from continual_concepts.core.model.deltas import LowRankDelta
from continual_concepts.core.model.sites import PROJECTIONS
from continual_concepts.core.model.slots import SLOTS, SlotDelta

from .joint_checks import (
    deltas_act_alike_in_three_ways,
    gradients_are_those_of_the_prediction,
    two_concepts_add_few_operations,
)
from .make_krea2 import LAYERS, TEXT, distance, krea2_model, krea2_studio

pytestmark = pytest.mark.usefixtures("has_krea2", "as_in_comfyui", "own_folder")
TRUE = {"features": 6144, "heads": 48, "kvheads": 12, "layers": 1}


@pytest.fixture(scope="module")
def krea(pack, has_krea2):
    with torch.inference_mode():
        return krea2_studio(pack)


@pytest.fixture
def backbone(krea):
    from continual_concepts.core.comfy.backbone import ComfyBackbone

    return ComfyBackbone(krea.model, krea.clip, krea.vae)


def noise_of(backbone, count: int = 1):
    return torch.randn(count, backbone.latent_channels, 8, 6, generator=torch.Generator().manual_seed(1))


def texts_of(backbone, *lengths: int):
    """Random prompts that are filled up to the longest one; a concept acts in each."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randn(length, TEXT * len(LAYERS), generator=generator) for length in lengths]
    hidden = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return Context(hidden.unsqueeze(1), None, ({"rex": (2, 3)},) * len(rows), lengths=lengths)


def slots_of(layout):
    generator = torch.Generator().manual_seed(4)
    return {(site.index, SLOTS): SlotDelta(torch.randn(3, site.width, generator=generator),
                                           2 * torch.randn(3, site.width, generator=generator), site.heads)
            for site in layout.sites}


def test_the_backbone_predicts_what_the_sampler_predicts(krea, backbone):
    from continual_concepts.core.model.backbone import TextPiece

    with torch.inference_mode(False), backbone.training(), torch.no_grad():
        noise, times = noise_of(backbone), torch.tensor([400])
        text, sigma = backbone.text[0].encode_pieces((TextPiece("a dog"),)), backbone.schedule.sigma(times)
        denoised = krea.model.model.apply_model(noise.unsqueeze(2), sigma, c_crossattn=text.states)
        velocity = (noise - denoised[:, :, 0]) / sigma.view(-1, 1, 1, 1)
        assert distance(backbone.predict(noise, times, Context(text.states.unsqueeze(1))), velocity) < 1e-4


def test_slots_share_the_attention_of_their_words_where_heads_share_keys(krea, backbone):
    """Against the formula, in the host's own attention: the picture's rows get mass times what they read from
    the slots; rows of text and of reference pictures get nothing."""
    from comfy.ldm.flux.math import apply_rope

    from continual_concepts.core.comfy.families.joint import Begin, Finish
    from continual_concepts.core.comfy.sites import PROCESSOR

    generator, layout, n, s, references = torch.Generator().manual_seed(2), backbone.layout, 5, 6, 2
    mask, deltas = torch.tensor([[0.0, 0.0, 1.0, 0.5, 0.0]]), slots_of(layout)
    processor = TokenLoraProcessor({})
    processor.concepts = TokenLora.at({"rex": mask}, {"rex": deltas})
    denoiser = krea.model.model.diffusion_model
    ids, x = torch.zeros(1, n + s, 3), torch.randn(1, n + s, 256, generator=generator)
    ids[0, n:, 1] = torch.arange(s)
    pe = denoiser.pe_embedder(ids)
    for site, block in zip(layout.sites, denoiser.blocks, strict=True):
        attention = block.attn
        options = {PROCESSOR: processor, "block_type": "single", "block_index": site.index,
                   "img_slice": [n, n + s], "reference_image_num_tokens": [references],
                   "patches": {"attn1_patch": [Begin(layout)], "attn1_output_patch": [Finish()]}}
        q, k, v = (layer(x).unflatten(-1, (-1, 128)).transpose(1, 2)
                   for layer in (attention.wq, attention.wk, attention.wv))
        q, k = attention.qknorm(q, k)
        turned_q, turned_k = apply_rope(q, k, pe)
        weights = (turned_q @ turned_k.mT / 128**0.5).softmax(-1)      # one head of keys for both of queries
        slots = deltas[site.index, SLOTS]
        keys, values = (part.unflatten(-1, (2, 128)).transpose(0, 1) for part in (slots.key, slots.value))
        mass = (weights[..., :n] * mask).sum(-1, keepdim=True)
        mass[:, :, :n], mass[:, :, n + s - references:] = 0, 0
        read = mass * ((q @ keys.mT / 128**0.5).softmax(-1) @ values)
        plain, expected = (attention.wo(attended.transpose(1, 2).flatten(2) * attention.gate(x).sigmoid())
                           for attended in (weights @ v, weights @ v + read))
        ours = attention(x, pe, None, options)
        own = slice(n, n + s - references)
        assert distance(ours, expected) < 1e-4 < 1e-2 < distance(plain[:, own], expected[:, own])
        assert distance(ours[:, :n], plain[:, :n]) < 1e-4


def test_rows_that_fill_a_batch_up_are_not_read(krea, backbone):
    """Nor are they mixed with the text in front of the first block; also where a concept acts."""
    both, noise = texts_of(backbone, 9, 6), noise_of(backbone, 2)
    rex, times = TokenLoraProcessor({"rex": slots_of(backbone.layout)}), torch.tensor([500, 300])
    with torch.inference_mode(False), backbone.training(), torch.no_grad():
        for processor in (None, rex):
            together = backbone.predict(noise, times, both, processor)
            for row, length in enumerate(both.lengths):
                own = Context(both.hidden[row:row + 1, :, :length], None, both.words[:1])
                alone = backbone.predict(noise[row:row + 1], times[row:row + 1], own, processor)
                assert distance(together[row:row + 1], alone) < 1e-5
        assert distance(together, backbone.predict(noise, times, both)) > 1e-3
        read = backbone.predict(noise, times, Context(both.hidden, None, both.words))
        assert distance(read[1], backbone.predict(noise, times, both)[1]) > 1e-3


def test_gradients_are_those_of_the_prediction(krea, backbone):
    """With and without gradient checkpointing, against finite differences, in a batch that is filled up."""
    inputs = noise_of(backbone, 2), torch.tensor([500, 300]), texts_of(backbone, 7, 5)
    with torch.inference_mode(False), backbone.training():
        gradients_are_those_of_the_prediction(backbone, slots_of(backbone.layout), inputs)


@pytest.mark.parametrize("chosen", [PROJECTIONS, *((name,) for name in PROJECTIONS)], ids=str)
def test_deltas_while_learning_are_patches_of_the_weights(krea, backbone, chosen):
    """Three ways to the same prediction: added to outputs, as adapters, and as the host's patches."""
    generator, model = torch.Generator().manual_seed(4), krea.model
    deltas = {(site.index, name): LowRankDelta(
        0.02 * torch.randn(site.shape(name)[0], 2, generator=generator),
        torch.randn(2, site.shape(name)[1], generator=generator))
        for site in backbone.layout.sites for name in chosen}
    adapters = LowRankAdapters(backbone.layout, 2, 1.0, generator, "cpu", chosen)
    adapters.load(deltas)
    inputs = noise_of(backbone), torch.tensor([500]), texts_of(backbone, 7)
    deltas_act_alike_in_three_ways(backbone, model, deltas, adapters, inputs)


@pytest.mark.slow
def test_one_block_at_the_true_widths(pack):
    """48 heads of 128 that share 12 of keys and values, bfloat16; the text keeps its reduced width."""
    own = krea2_studio(pack, krea2_model(torch.bfloat16, **TRUE))
    nouns = "a dog dog dog dog"
    plain = own.ksampler(own.model, nouns, "", steps=1)
    bank = own.learn(method="slots", steps=2, training_settings=[{"gradient_checkpointing": True}])
    site = bank.layout.sites[0]
    assert (site.width, site.heads, site.key_width, len(bank.layout)) == (6144, 48, 1536, 1)
    model, clip, positive = own.aggregate("a <spot>", bank)
    changed = own.ksampler(model, positive, own.encode(clip, ""), steps=1)
    assert torch.isfinite(changed).all() and not torch.equal(changed, plain)
    assert torch.equal(own.ksampler(own.model, nouns, "", steps=1), plain)


def test_two_concepts_add_few_operations_at_the_true_widths(comfyui, monkeypatch):
    """One block, a picture of 1024 pixels, counted without computing."""
    import comfy.ldm.krea2.model as krea2
    import comfy.ops

    from continual_concepts.core.model.sites import one_stream_layout

    def make():
        return krea2.SingleStreamDiT(**TRUE, dtype=torch.float32, device="meta",
                                     operations=comfy.ops.disable_weight_init)

    layout = one_stream_layout(1, 48, 6144, 1536, (("qwen3vl_4b", 2560),))
    two_concepts_add_few_operations(make, layout, 12 * 2560, monkeypatch)

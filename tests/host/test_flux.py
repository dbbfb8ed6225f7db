"""Flux.1, Flux.2 Klein and Chroma with random weights: slots are learned and act in the picture's rows alone,
nothing of the user's objects changes, and what does not work is refused in one sentence."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from continual_concepts.core.errors import ConceptError
from continual_concepts.core.model.context import Context
from continual_concepts.core.model.slots import SLOTS, SlotDelta

from .joint_checks import (
    foreign_patches_act_in_front_alone,
    gradients_are_those_of_the_prediction,
    nodes_that_compute_with_conditionings_carry_concepts_along,
    weights_are_read_as_in_plain_comfyui_and_those_of_concepts_act,
)
from .make_flux import Latents, distance, flux_model, model_and_clip, studio_of

pytestmark = pytest.mark.usefixtures("has_patches", "as_in_comfyui", "own_folder")
SCENE = "a photo of a meadow"
DOGS = "dog dog dog dog"      # what stands for an object of four words


@pytest.fixture(scope="module", params=["flux", "klein", "chroma"])
def joint(request, pack, has_patches):
    """The studio with a tiny model, a bank with two objects, and the MODEL's weights before they were
    learned."""
    with torch.inference_mode():
        studio = studio_of(pack, *model_and_clip(request.param))
        before = {name: weight.clone() for name, weight in studio.model.model.state_dict().items()}
        bank = studio.learn(method="slots", steps=2, preview_every=2)
        bank = studio.learn(method="slots", steps=2, name="tom", noun="teddy bear", bank=[bank],
                            training_settings=[{"gradient_checkpointing": True}])
    return SimpleNamespace(studio=studio, bank=bank, before=before, kind=request.param)


def test_learning_changes_nothing_of_the_users_objects(joint):
    sites = [site.name for site in joint.bank.layout.sites]
    assert sites == ["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"]
    assert joint.bank["spot"].slots and joint.bank["spot"].thumbnail
    model, after = joint.studio.model, joint.studio.model.model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in joint.before.items())
    assert not any("forward" in module.__dict__ for module in model.model.modules())
    assert not model.patches and not model.model_options["transformer_options"]


def test_a_prompt_is_what_the_stock_text_node_makes_of_the_class_noun(joint):
    from continual_concepts.core.comfy.sites import WORDS
    from continual_concepts.core.comfy.text import row_tokenizer, row_tokens
    from continual_concepts.core.comfy.token_lora import code

    studio = joint.studio
    clip = studio.aggregate("", joint.bank)[1]
    [[ours, extra]] = studio.encode(clip, "a photo of <tom> and <spot>")
    bears = " ".join(["teddy bear"] * 4)
    text = f"a photo of {bears} and {DOGS}"
    [[theirs, plain]] = studio.encode(studio.clip, text)
    assert torch.equal(ours, theirs)
    if joint.kind == "flux":
        assert torch.equal(extra["pooled_output"], plain["pooled_output"])
    codes = extra["model_conds"][WORDS].cond[0, 0, :, 0]
    rows = row_tokenizer(studio.clip)
    ids = [token for token, *_ in row_tokens(studio.clip.tokenize(text))]
    for name, noun in (("tom", bears), ("spot", DOGS)):
        found = "".join(rows.inv_vocab[ids[place]] for place in (codes == code(name)).nonzero().flatten())
        assert found.replace("▁", "").replace("Ġ", "") == noun.replace(" ", "")


def test_neutral_settings_are_plain_comfyui_bit_for_bit(joint):
    studio, bank = joint.studio, joint.bank
    plain = studio.ksampler(studio.model, f"a photo of {DOGS}", "bad")
    off, clip, positive = studio.aggregate("a photo of <spot>", bank, strength=0.0)
    assert torch.equal(studio.ksampler(off, positive, studio.encode(clip, "bad")), plain)
    on, clip, positive = studio.aggregate("a photo of <spot>", bank)
    changed = studio.ksampler(on, positive, studio.encode(clip, "bad"))
    assert torch.isfinite(changed).all() and distance(changed, plain) > 1e-3
    both = studio.ksampler(on, studio.encode(clip, "a photo of <spot> and <tom>"), "bad")
    assert distance(both, changed) > 1e-3
    meadow = studio.ksampler(studio.model, SCENE, "")
    assert torch.equal(studio.ksampler(on, studio.encode(clip, SCENE), studio.encode(clip, "")), meadow)
    assert torch.equal(studio.regional(SCENE, bank=bank), meadow)
    assert torch.equal(studio.ksampler(studio.model, f"a photo of {DOGS}", "bad"), plain)


@pytest.fixture
def backbone(joint):
    from continual_concepts.core.comfy.backbone import ComfyBackbone

    return ComfyBackbone(joint.studio.model, joint.studio.clip, joint.studio.vae)


def test_the_backbone_predicts_what_the_sampler_predicts(joint, backbone):
    """The velocity, from the model's own `apply_model`, with the pooled text."""
    from continual_concepts.core.model.backbone import TextPiece

    with torch.inference_mode(False), backbone.training(), torch.no_grad():
        noise = noise_of(backbone)
        text, times = backbone.text[0].encode_pieces((TextPiece("a dog"),)), torch.tensor([400])
        sigma = backbone.schedule.sigma(times)
        guidance = torch.tensor([0.0 if joint.kind == "chroma" else 1.0])
        denoised = joint.studio.model.model.apply_model(noise, sigma, c_crossattn=text.states, y=text.pooled,
                                                        guidance=guidance)
        context = Context(text.states.unsqueeze(1), text.pooled)
        assert distance(backbone.predict(noise, times, context),
                        (noise - denoised) / sigma.view(-1, 1, 1, 1)) < 1e-4


def noise_of(backbone):
    return torch.randn(1, backbone.latent_channels, 8, 6, generator=torch.Generator().manual_seed(1))


def text_of(backbone):
    width = backbone.unet.params.context_in_dim
    return torch.randn(1, 7, width, generator=torch.Generator().manual_seed(5))


def slots_of(layout, value: float):
    generator = torch.Generator().manual_seed(4)
    return {(site.index, SLOTS): SlotDelta(torch.randn(3, site.width, generator=generator),
                                           value * torch.randn(3, site.width, generator=generator),
                                           site.heads)
            for site in layout.sites}


@pytest.mark.parametrize("references", [0, 2])
def test_slots_share_the_attention_of_their_words_in_the_joint_softmax(joint, backbone, references):
    """Against the formula, also with another node's mask: the picture's rows get mass times what they read
    from the slots, and rows of text and of reference pictures nothing."""
    from comfy.ldm.flux.math import apply_rope, attention

    from continual_concepts.core.attention.token_lora import TokenLora, TokenLoraProcessor
    from continual_concepts.core.comfy.families.joint import Begin, Finish
    from continual_concepts.core.comfy.sites import PROCESSOR

    generator = torch.Generator().manual_seed(2)
    layout, n, s = backbone.layout, 5, 6
    deltas = slots_of(layout, 1.0)
    processor = TokenLoraProcessor({})
    mask = torch.tensor([[0.0, 0.0, 1.0, 0.5, 0.0]])
    processor.concepts = TokenLora.at({"rex": mask}, {"rex": deltas})
    begin, finish = Begin(backbone.layout), Finish()
    q, k, v = (torch.randn(1, 2, n + s, 128, generator=generator) for _ in range(3))
    denoiser = joint.studio.model.model.diffusion_model
    ids = torch.zeros(1, n + s, len(denoiser.params.axes_dim))
    ids[0, n:, 1] = torch.arange(s)
    ids[0, :n, -1] = torch.arange(n) * (joint.kind == "klein")      # the others give words no positions
    pe = denoiser.pe_embedder(ids)
    turned_q, turned_k = apply_rope(q, k, pe)
    bias = torch.randn(1, n + s, n + s, generator=generator) if references else None
    weights = (turned_q @ turned_k.mT / 128**0.5 + (0 if bias is None else bias)).softmax(-1)
    for site in layout.sites:
        kind, _, index = site.name.partition("_blocks.")
        options = {PROCESSOR: processor, "block_type": kind, "block_index": int(index),
                   "img_slice": [n, n + s], "patches": {"attn1_patch": [begin]},
                   "reference_image_num_tokens": [references]}
        given = begin(q, k, v, pe=pe, attn_mask=bias, extra_options=options)
        ours = finish(attention(given["q"], given["k"], v, given["pe"], given["attn_mask"]), options)
        slots = deltas[site.index, "slots"]
        keys, values = (x.unflatten(-1, (2, 128)).transpose(0, 1) for x in (slots.key, slots.value))
        read = (q @ keys.mT / 128**0.5).softmax(-1) @ values
        mass = (weights[..., :n] * mask).sum(-1, keepdim=True)
        mass[:, :, :n], mass[:, :, n + s - references:] = 0, 0
        expected = (weights @ v + mass * read).transpose(1, 2).flatten(2)
        assert torch.allclose(ours, expected, atol=1e-4)
        plain = (weights @ v).transpose(1, 2).flatten(2)
        assert not torch.allclose(ours[:, n], plain[:, n], atol=1e-2)


def test_rows_that_fill_a_batch_up_are_not_read(joint, backbone):
    """Also where a concept acts."""
    from continual_concepts.core.attention.token_lora import TokenLoraProcessor

    text, noise = text_of(backbone), noise_of(backbone)
    longer = torch.nn.functional.pad(text, (0, 0, 0, 4))
    with torch.inference_mode(False), backbone.training(), torch.no_grad():
        def predicted(rows, processor=None):
            context = Context(rows.unsqueeze(1), None, ({"rex": (2, 3)},), lengths=(text.shape[1],))
            return backbone.predict(noise, torch.tensor([500]), context, processor)

        rex = TokenLoraProcessor({"rex": slots_of(backbone.layout, 2.0)})
        plain, acting = predicted(text), predicted(text, rex)
        assert distance(acting, plain) > 1e-3
        assert distance(predicted(longer), plain) < 1e-5 and distance(predicted(longer, rex), acting) < 1e-5


def test_gradients_are_those_of_the_prediction(joint, backbone):
    """Although the host's blocks write into their inputs: with and without gradient checkpointing, against
    finite differences."""
    context = Context(text_of(backbone).unsqueeze(1), None, ({"rex": (2, 3)},))
    with torch.inference_mode(False), backbone.training():
        gradients_are_those_of_the_prediction(backbone, slots_of(backbone.layout, 2.0),
                                              (noise_of(backbone), torch.tensor([500]), context))


def test_nodes_that_compute_with_conditionings_carry_concepts_along(joint):
    nodes_that_compute_with_conditionings_carry_concepts_along(joint.studio, joint.bank)


def test_weights_are_read_as_in_plain_comfyui_and_those_of_concepts_act(joint):
    weights_are_read_as_in_plain_comfyui_and_those_of_concepts_act(joint.studio, joint.bank)


def test_what_does_not_work_is_refused_before_any_work(joint, studio, monkeypatch):
    ours = joint.studio
    monkeypatch.setattr(Latents, "encode", lambda *_: pytest.fail("a photo was encoded"))
    for inputs, message in (({"method": "cidm"}, "method 'cidm' learns words"),
                            ({"method": "slots", "noun": ""}, "class noun is empty")):
        with pytest.raises(ConceptError, match=message):
            ours.learn(steps=1, **inputs)
    with pytest.raises(ConceptError, match=r"\(artists\) is 0.5.*has none; allowed: 0"):
        ours.regional("<spot> and <tom>", (), joint.bank, artists=0.5)
    with pytest.raises(ConceptError, match="the CLIP has the text encoders clip_l"):
        ours.aggregate("<spot>", joint.bank, clip=studio.clip)
    settings = {"prompt": "a dog", "score": "activation", "unit": "weight", "share": 0.1, "quorum": 0.5,
                "draws": 1, "resolution": 64, "seed": 0, "model": ours.model, "clip": ours.clip}
    with pytest.raises(ConceptError, match="joint attention.*concept neurons are not supported"):
        ours.pack.ConceptNeuronSelect.execute(**{key: [value] for key, value in settings.items()})


def test_another_nodes_patch_behind_the_concepts_is_refused_and_before_them_acts(joint):
    foreign_patches_act_in_front_alone(joint.studio, joint.bank)


def test_a_concept_works_on_a_distilled_sibling_and_models_that_read_pictures_are_refused(joint):
    """Shapes alone: the weights are random."""
    from continual_concepts.core.comfy.families import find_sites
    from continual_concepts.core.comfy.text import text_widths

    if joint.kind != "flux":
        pytest.skip("one kind is enough")
    ours, schnell = joint.studio, flux_model(distilled=False)
    model, clip, positive = ours.aggregate("a <spot>", joint.bank, model=schnell)
    drawn = ours.ksampler(model, positive, ours.encode(clip, ""), steps=2)
    assert torch.isfinite(drawn).all()
    assert distance(drawn, ours.ksampler(schnell, f"a {DOGS}", "", steps=2)) > 1e-3
    with pytest.raises(ConceptError, match="class is Flux, which reads a picture beside text"):
        find_sites(flux_model(in_channels=96), text_widths(ours.clip))
    with pytest.raises(ConceptError, match="texts of width 64, but the CLIP.*t5xxl of width 4096"):
        find_sites(schnell, (("t5xxl", 4096),))


def test_concepts_are_evaluated_and_saved(joint, tmp_path):
    """Through the library's own sampler, with a bank from a file."""
    from continual_concepts.core.bank.format import open_bank, save_bank
    from continual_concepts.core.comfy.backbone import ComfyBackbone
    from continual_concepts.core.sampling.sampling import SampleSettings, sample

    save_bank(joint.bank, tmp_path / "bank.safetensors")
    bank = open_bank(tmp_path / "bank.safetensors")
    backbone = ComfyBackbone(joint.studio.model, joint.studio.clip, joint.studio.vae)
    settings = SampleSettings(steps=2, size=(64, 64))
    with backbone.training():
        named = sample(backbone, bank, ["a photo of <spot> and <tom>"], [1], settings)
        nouns = f"a photo of {DOGS} and {' '.join(['teddy bear'] * 4)}"
        plain = sample(backbone, bank, [nouns], [1], settings)
    assert named.shape == plain.shape == (1, 3, 64, 64) and distance(named, plain) > 1e-4


def test_learning_on_a_distilled_model_tells_so(joint, caplog):
    joint.studio.learn(method="slots", steps=1, name="new")
    assert ("Flux.1 dev and schnell are distilled" in caplog.text) == (joint.kind == "flux")


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_model_that_is_loaded_in_part(joint, share):
    joint.studio.check_loaded_in_part(joint.bank, "a <spot>", share)


def test_a_reference_picture_acts_beside_a_concept(joint):
    if joint.kind == "chroma":
        pytest.skip("Chroma reads no reference pictures")
    ours = joint.studio
    model, clip, positive = ours.aggregate("a <spot>", joint.bank)
    picture = torch.randn(ours.latent()["samples"].shape, generator=torch.Generator().manual_seed(8))
    referring = [[states, {**extra, "reference_latents": [picture]}] for states, extra in positive]
    negative = ours.encode(clip, "")
    drawn = ours.ksampler(model, referring, negative)
    assert torch.isfinite(drawn).all()
    assert distance(drawn, ours.ksampler(model, positive, negative)) > 1e-3

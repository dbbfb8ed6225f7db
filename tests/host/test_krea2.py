"""Krea 2 with random weights: concepts are learned, and act at the rows of their nouns and in their boxes.
Nothing of the user's objects changes, and what does not work is refused in one sentence."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from continual_concepts.core.errors import ConceptError
from continual_concepts.core.model.sites import PROJECTIONS

from .joint_checks import (
    foreign_patches_act_in_front_alone,
    nodes_that_compute_with_conditionings_carry_concepts_along,
    weights_are_read_as_in_plain_comfyui_and_those_of_concepts_act,
)
from .make_krea2 import distance, krea2_model, krea2_studio

pytestmark = pytest.mark.usefixtures("has_krea2", "as_in_comfyui", "own_folder")
SCENE = "a photo of a meadow"
DOGS, BEARS = " ".join(["dog"] * 4), " ".join(["teddy bear"] * 4)      # what stands for four words


@pytest.fixture(scope="module")
def krea(pack, has_krea2):
    """The studio with a tiny model, a bank with two objects and a style, and the MODEL's weights before they
    were learned."""
    with torch.inference_mode():
        studio = krea2_studio(pack)
        before = {name: weight.clone() for name, weight in studio.model.model.state_dict().items()}
        bank = studio.learn(method="slots", steps=2, lr=0.3, preview_every=2)
        bank = studio.learn(method="slots", steps=2, lr=0.3, name="tom", noun="teddy bear", bank=[bank],
                            training_settings=[{"gradient_checkpointing": True}])
        bank = studio.learn(method="lora", steps=2, name="ink", noun="drawing", kind="style", bank=[bank])
    return SimpleNamespace(studio=studio, bank=bank, before=before)


@pytest.fixture
def backbone(krea):
    from continual_concepts.core.comfy.backbone import ComfyBackbone

    return ComfyBackbone(krea.studio.model, krea.studio.clip, krea.studio.vae)


# Learning and applying


def test_learning_changes_nothing_of_the_users_objects(krea):
    sites = [(site.name, site.heads, site.width, site.key_width) for site in krea.bank.layout.sites]
    assert sites == [(f"blocks.{number}", 2, 256, 128) for number in range(3)]
    assert krea.bank["spot"].slots and krea.bank["spot"].thumbnail
    assert {projection for _, projection in krea.bank["ink"].deltas} == set(PROJECTIONS)
    assert all(delta.up.abs().max() > 0 for delta in krea.bank["ink"].deltas.values())
    model, after = krea.studio.model, krea.studio.model.model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in krea.before.items())
    assert not any("forward" in module.__dict__ for module in model.model.modules())
    assert not model.patches and not model.model_options["transformer_options"]


USER = "<|im_start|>user\n{}<|im_end|>\n"


@pytest.mark.parametrize("template", ["{}", USER, "<|im_start|>system\nA dog.<|im_end|>\n" + USER],
                         ids=["own", "user", "system"])
def test_a_concept_acts_at_the_rows_of_its_noun_behind_what_is_cut_off(krea, template):
    """The text is what the stock node makes of the noun. Rows of the states are the last tokens."""
    from continual_concepts.core.comfy.sites import WORDS
    from continual_concepts.core.comfy.token_lora import code

    studio = krea.studio
    clip = studio.aggregate("", krea.bank)[1]
    [[ours, extra]] = studio.encode(clip, template.format("a photo of <tom> and <spot>"))
    text = template.format(f"a photo of {BEARS} and {DOGS}")
    [[theirs, _]] = studio.encode(studio.clip, text)
    assert torch.equal(ours, theirs)
    rows = studio.clip.tokenizer.qwen3vl_4b
    ids = [token for token, *_ in studio.clip.tokenize(text)["qwen3vl_4b"][0]]
    assert ours.shape[1] < len(ids)
    ids, codes = ids[-ours.shape[1]:], extra["model_conds"][WORDS].cond[0, 0, :, 0]
    for name, noun in (("tom", BEARS), ("spot", DOGS)):
        places = (codes == code(name)).nonzero().flatten().tolist()
        assert "".join(rows.inv_vocab[ids[place]] for place in places).replace("Ġ", " ").strip() == noun
    assert set(codes.unique().tolist()) == {0, code("tom"), code("spot")}


def test_the_library_reads_the_same_rows(krea, backbone):
    from continual_concepts.core.conditioning.encoding import encode_prompts

    prompts = krea.bank.vocabulary.parse_all(["a photo of <tom> and <spot>", "<spot>"])
    context = encode_prompts(backbone, prompts, {name: krea.bank[name].tokens for name in krea.bank.names})
    [[states, _]] = krea.studio.encode(krea.studio.clip, f"a photo of {BEARS} and {DOGS}")
    assert torch.equal(context.hidden[0, 0], states[0]) and context.lengths[0] == states.shape[1]
    assert context.lengths[1] < context.lengths[0]
    assert context.words == ({"tom": tuple(range(3, 15)), "spot": tuple(range(16, 20))},      # t, eddy, bear
                             {"spot": tuple(range(4))})


def test_neutral_settings_are_plain_comfyui_bit_for_bit(krea):
    studio, bank = krea.studio, krea.bank
    plain = studio.ksampler(studio.model, f"a photo of {DOGS}", "bad")
    off, clip, positive = studio.aggregate("a photo of <spot>", bank, strength=0.0)
    assert torch.equal(studio.ksampler(off, positive, studio.encode(clip, "bad")), plain)
    on, clip, positive = studio.aggregate("a photo of <spot>", bank)
    changed = studio.ksampler(on, positive, studio.encode(clip, "bad"))
    assert torch.isfinite(changed).all() and distance(changed, plain) > 1e-3
    both = studio.ksampler(on, studio.encode(clip, "a photo of <spot> and <tom>"), "bad")
    nouns = studio.ksampler(studio.model, f"a photo of {DOGS} and {BEARS}", "bad")
    alone = studio.ksampler(on, studio.encode(clip, f"a photo of <spot> and {BEARS}"), "bad")
    assert distance(both, nouns) > 1e-3 and distance(both, alone) > 1e-3 and distance(alone, nouns) > 1e-3
    meadow = studio.ksampler(studio.model, SCENE, "")
    assert torch.equal(studio.ksampler(on, studio.encode(clip, SCENE), studio.encode(clip, "")), meadow)
    assert torch.equal(studio.regional(SCENE, bank=bank), meadow)
    inked, clip, positive = studio.aggregate("a <ink> of <tom>", bank)
    styled = studio.ksampler(inked, positive, studio.encode(clip, "bad"))
    unstyled = studio.ksampler(on, studio.encode(clip, "a drawing drawing of <tom>"), "bad")
    assert torch.isfinite(styled).all() and distance(styled, unstyled) > 1e-3
    assert torch.equal(studio.ksampler(studio.model, f"a photo of {DOGS}", "bad"), plain)


# Banks, other models, other nodes


def test_concepts_are_saved_and_drawn_by_the_library(krea, backbone, tmp_path):
    """With prompts of two lengths in one batch."""
    from continual_concepts.core.bank.format import open_bank, save_bank
    from continual_concepts.core.sampling.sampling import SampleSettings, sample

    save_bank(krea.bank, tmp_path / "bank.safetensors")
    bank, settings = open_bank(tmp_path / "bank.safetensors"), SampleSettings(steps=2, size=(64, 64))
    assert bank.layout == krea.bank.layout
    for name in bank.names:
        for place, delta in krea.bank[name].deltas.items():
            assert all(torch.equal(*pair) for pair in zip(delta.tensors(), bank[name].deltas[place].tensors(),
                                                          strict=True))
    with backbone.training():
        named = sample(backbone, bank, ["a photo of <spot> and <tom>", "a <spot>"], [1, 2], settings)
        plain = sample(backbone, bank, [f"a photo of {DOGS} and {BEARS}"], [1], settings)
        alone = sample(backbone, bank, ["a <spot>"], [2], settings)
    assert named.shape == (2, 3, 64, 64) and distance(named[:1], plain) > 1e-4
    assert distance(named[1:], alone) < 1e-3


def test_a_concept_works_on_a_sibling_in_another_type(krea):
    """As one that is learned on Raw does on Turbo: shapes alone, because weights are random."""
    ours, other = krea.studio, krea2_model(torch.bfloat16)
    model, clip, positive = ours.aggregate("a <ink> of <spot>", krea.bank, model=other)
    drawn = ours.ksampler(model, positive, ours.encode(clip, ""), steps=2)
    assert torch.isfinite(drawn).all()
    assert distance(drawn, ours.ksampler(other, f"a drawing drawing of {DOGS}", "", steps=2)) > 1e-3


def test_a_model_that_is_loaded_in_part(krea):
    krea.studio.check_loaded_in_part(krea.studio.learn(method="slots", steps=2), "a <spot>", 0.5)


@pytest.mark.parametrize("method", ["index", "index_timestep_zero"])
def test_a_reference_picture_acts_beside_a_concept(krea, method):
    ours = krea.studio
    model, clip, positive = ours.aggregate("a <spot>", krea.bank)
    picture = torch.randn(ours.latent()["samples"].shape, generator=torch.Generator().manual_seed(8))
    more = {"reference_latents": [picture], "reference_latents_method": method}
    referring, plain = ([[states, {**extra, **more}] for states, extra in prompt]
                        for prompt in (positive, ours.encode(ours.clip, f"a {DOGS}")))
    negative = ours.encode(clip, "")
    drawn = ours.ksampler(model, referring, negative)
    assert torch.isfinite(drawn).all() and distance(drawn, ours.ksampler(model, positive, negative)) > 1e-3
    assert distance(drawn, ours.ksampler(ours.model, plain, negative)) > 1e-3


def test_another_nodes_patch_behind_the_concepts_is_refused_and_before_them_acts(krea):
    foreign_patches_act_in_front_alone(krea.studio, krea.bank)


def test_nodes_that_compute_with_conditionings_carry_concepts_along(krea):
    nodes_that_compute_with_conditionings_carry_concepts_along(krea.studio, krea.bank)


def test_weights_are_read_as_in_plain_comfyui_and_those_of_concepts_act(krea):
    weights_are_read_as_in_plain_comfyui_and_those_of_concepts_act(krea.studio, krea.bank)


def test_what_does_not_work_is_refused_before_any_work(krea, studio, tmp_path, monkeypatch):
    from continual_concepts.core.comfy.families import find_sites
    from continual_concepts.core.interop.export import export_concept

    ours = krea.studio
    monkeypatch.setattr(type(ours.vae), "encode", lambda *_: pytest.fail("a photo was encoded"))
    for inputs, message in (({"method": "cidm"}, "method 'cidm' learns words"),
                            ({"method": "slots", "noun": ""}, "class noun is empty")):
        with pytest.raises(ConceptError, match=message):
            ours.learn(steps=1, **inputs)
    with pytest.raises(ConceptError, match=r"\(artists\) is 0.5.*has none; allowed: 0"):
        ours.regional("<spot> and <tom>", (), krea.bank, artists=0.5)
    with pytest.raises(ConceptError, match="joint attention.*finding regions is not supported"):
        ours.regional("<spot> and <tom>", [], krea.bank, find_regions=True)
    with pytest.raises(ConceptError, match="Krea2 with texts of qwen3vl_4b of width 80, but the CLIP has the "
                                           "text encoders clip_l"):
        ours.aggregate("<spot>", krea.bank, clip=studio.clip)
    with pytest.raises(ConceptError, match="encoders qwen3_4b of width 80; connect the model's own CLIP"):
        find_sites(ours.model, (("qwen3_4b", 80),))
    settings = {"prompt": "a dog", "score": "activation", "unit": "weight", "share": 0.1, "quorum": 0.5,
                "draws": 1, "resolution": 64, "seed": 0, "model": ours.model, "clip": ours.clip}
    with pytest.raises(ConceptError, match="joint attention.*concept neurons are not supported"):
        ours.pack.ConceptNeuronSelect.execute(**{key: [value] for key, value in settings.items()})
    with pytest.raises(ConceptError, match="joint attention.*files for other programs is not supported"):
        export_concept(krea.bank, "ink", tmp_path)


# Regions


@pytest.mark.parametrize("settings", [{}, {"solo": 1.0}, {"isolation": 1.0}], ids=str)
@pytest.mark.parametrize("prompt", ["a photo of a dog in the snow", "a photo of <tom> in the snow"])
def test_a_region_over_the_whole_picture_is_its_prompt(krea, prompt, settings):
    """Although its text stands beside a longer one of the scene: texts do not read one another."""
    studio, scene = krea.studio, "a wide green meadow with very many flowers under a blue sky"
    model, clip, positive = studio.aggregate(prompt, krea.bank)
    expected = studio.ksampler(model, positive, studio.encode(clip, ""))
    found = studio.regional(scene, [studio.region(prompt)], krea.bank, **settings)
    plain = studio.ksampler(studio.model, scene, "")
    assert distance(found, expected) < 1e-3 < 1e-2 < distance(plain, expected)


def test_two_concepts_in_two_boxes(krea):
    """Both right regions have the same text, so that they only differ by the concept."""
    studio = krea.studio

    def boxes(right: str, **settings):
        regions = [studio.region("a photo of <spot>", right=0.5), studio.region(right, left=0.5)]
        return studio.regional(SCENE, regions, krea.bank, **settings)

    both, one = (boxes(text, steps=1, isolation=1.0) for text in ("a photo of <tom>", f"a photo of {BEARS}"))
    half = both.shape[-1] // 2
    left, right = distance(both[..., :half], one[..., :half]), distance(both[..., half:], one[..., half:])
    assert left < 1e-6 < 1e-3 < right
    plain = boxes("a photo of <tom>")
    for settings in ({"solo": 0.7}, {"region_noise": True}):
        found = boxes("a photo of <tom>", **settings)
        assert torch.isfinite(found).all() and distance(found, plain) > 1e-3
    model, clip, _ = studio.aggregate("", krea.bank)
    regions = [studio.region("a photo of <spot>", right=0.5), studio.region("a photo of <tom>", left=0.5)]
    applied = studio.apply_regions(regions, studio.encode(clip, SCENE), studio.encode(clip, ""), model, clip)
    assert distance(studio.ksampler(*applied), plain) < 1e-4


def test_no_region_and_strength_zero_are_plain_comfyui_bit_for_bit(krea):
    studio = krea.studio
    plain = studio.ksampler(studio.model, SCENE, "")
    off = [studio.region("a photo of <spot>", strength=0.0)]
    assert torch.equal(studio.regional(SCENE, off, krea.bank), plain)
    assert torch.equal(studio.regional(SCENE, [], krea.bank), plain)

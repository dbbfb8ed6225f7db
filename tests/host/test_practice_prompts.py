"""Prompts in ComfyUI's graphs: one grammar, two texts of SDXL, weights on concepts, notes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.prompts import WordRef
from continual_concepts.core.errors import ConceptError

pytestmark = pytest.mark.usefixtures("as_in_comfyui")


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# ----- one grammar -----

TEXTS = st.sampled_from(["a dog", " red ", "in a park, ", "<rex>", "<mimi:0.5>", "<rex-2>", "< mimi >",
                         "<rex:1.3>", "＜rex＞", "(", ")", ":1.2)", ":", ":)", r"\(", r"\)", r"\<rex\>",
                         "<lora:rex:1>", "((", " "])
PROMPTS = st.lists(TEXTS, max_size=9).map("".join)


def test_g8_sibling_both_hosts_read_a_prompt_alike(carrying, mixed, trials):
    """The library's pieces and weights are the tokens and weights of ComfyUI's tokenizer."""
    from continual_concepts.core.comfy.concept_encoder import word_token
    from continual_concepts.core.comfy.text import ComfyText

    clip = carrying[1]
    encoder, learned = ComfyText("clip_l", clip), {}
    for concept in mixed:
        for i in range(len(concept.tokens.words)):
            word = WordRef(concept.name, i)
            learned[word_token(concept.tokens.word(i, "clip_l").float(), word).numpy().tobytes()] = word

    @settings(max_examples=trials(50, 2000), deadline=None)
    @given(PROMPTS)
    def alike(text):
        try:
            parsed = mixed.parse(text)
        except ConceptError:
            with pytest.raises(ConceptError):
                clip.tokenize(text)
            return
        ours = [(unit, weight) for piece, weight in parsed.weighted
                for unit in ([piece] if isinstance(piece, WordRef) else encoder.ids(piece))]
        chunks = clip.tokenize(text)["l"]
        theirs = [(learned[token.numpy().tobytes()] if torch.is_tensor(token) else token, weight)
                  for chunk in chunks for token, weight in chunk[1:]]
        assert [pair for pair in theirs if pair[0] not in (encoder.end, encoder.pad, encoder.start)] == ours

    alike()


@pytest.mark.parametrize("text", [
    "a (red:1.4) dog (on grass)", "(a <plain:0.5> and <rex:1.5> in a park:0.7)",
    "a photo of a cat, " + "in a green meadow with a (red:1.3) ball, " * 6 + "(<mimi>:0.5) at night",
    "dog " * 74 + "<rex> in a park",
])
def test_g8_sibling_both_hosts_encode_weighted_prompts_alike(studio, demo, mixed, text, contents):
    from continual_concepts.core.comfy.backbone import ComfyBackbone
    from continual_concepts.core.comfy.concept_clip import concept_clip
    from continual_concepts.core.sampling.sampling import encode

    ours = contents(studio.encode(concept_clip(studio.clip, mixed, True), text))
    theirs = encode(ComfyBackbone(*demo), mixed, [text])
    assert distance(ours.hidden, theirs.hidden.expand_as(ours.hidden)) < 1e-5
    named = {name: places for name, places in theirs.words[0].items() if mixed[name].info.method == "bound"}
    assert ours.words == (named,)
    for name in named:
        theirs_of = theirs.strengths[0].get(name) if theirs.strengths else None
        assert (ours.strengths[0][name] if ours.strengths else None) == pytest.approx(theirs_of)


# ----- G3: two texts -----

def both_texts(clip, text_g: str, text_l: str):
    """ComfyUI's CLIPTextEncodeSDXL."""
    from comfy_extras.nodes_clip_sdxl import CLIPTextEncodeSDXL

    sizes = {"width": 64, "height": 64, "crop_w": 0, "crop_h": 0, "target_width": 64, "target_height": 64}
    return CLIPTextEncodeSDXL.execute(clip, **sizes, text_g=text_g, text_l=text_l)[0]


@pytest.fixture(scope="module")
def xl(tiny_xl, tiny_sdxl, make_concept, studio):
    """CLIP with <rex> and <mimi>, word-bound, and the names of the concepts."""
    from continual_concepts.core.comfy.concept_clip import concept_clip

    bank = ConceptBank(tiny_sdxl.layout)
    for i, name in enumerate(("rex", "mimi")):
        bank = bank.add(make_concept(tiny_sdxl.layout, name, seed=i, method="bound"))
    with torch.inference_mode():
        return concept_clip(tiny_xl[1], bank, True), bank


def words(conditioning, bank) -> dict[str, tuple[int, ...]]:
    from continual_concepts.core.comfy.apply import context_of

    return context_of(conditioning, bank.layout.copies, tuple(bank.names)).words[0]


def test_g3_words_of_both_texts_act(xl):
    clip, bank = xl
    same = words(both_texts(clip, "a <rex>", "a <rex>"), bank)
    assert same == {"rex": (2, 3)} == words(both_texts(clip, "a dog", "a <rex>"), bank)
    assert words(both_texts(clip, "a <rex>", "<rex> dog"), bank) == {"rex": (1, 2, 3)}
    assert words(both_texts(clip, "a dog <rex>", "<mimi>"), bank) == {"mimi": (1, 2), "rex": (3, 4)}


@pytest.mark.parametrize(("text_g", "text_l", "difference"), [
    ("a <rex>", "a <mimi>", "<mimi> and <rex> at the same place, token 2"),
    ("<rex:1.5>", "<rex>", "<rex> the weights 1 and 1.5 at the same place, token 1"),
])
def test_g3_texts_that_cannot_agree_are_told(xl, text_g, text_l, difference):
    with pytest.raises(ConceptError) as caught:
        both_texts(xl[0], text_g, text_l)
    assert difference in str(caught.value)


def test_g3_sibling_each_encoder_keeps_its_words_at_its_own_places(xl, tiny_sdxl):
    """With placeholder nouns, a word is inserted in its encoder's part of the states alone."""
    from continual_concepts.core.comfy.concept_clip import concept_clip

    clip, bank = xl
    noun = bank.replace(replace(bank["rex"], tokens=replace(bank["rex"].tokens, placeholder_noun="dog")))
    clip = concept_clip(clip, noun, True)
    width = dict(noun.layout.text_widths)["clip_l"]
    first, second = (both_texts(clip, g, "a <rex> in a park")[0][0] for g in ("a <rex> in a park", "<rex>"))
    assert torch.equal(first.plain[..., :width], second.plain[..., :width])


def test_g3_sibling_texts_of_different_length(xl):
    clip, bank = xl
    long = "a <rex>, " + "very " * 40
    assert words(both_texts(clip, "<mimi>", "a red dog " * 8 + "<rex>"), bank)["mimi"] == (1, 2)
    assert words(both_texts(clip, long, "a dog"), bank) == {"rex": (2, 3)}


# ----- G8: weights -----

@pytest.mark.parametrize("weight", [0.4, 1.5])
def test_g8_a_weight_is_the_strength_of_a_word_bound_concept(studio, draw, mixed, weight):
    model, clip, _ = studio.aggregate("", mixed, strength=weight)
    expected = draw("a <rex> in a park", model, clip=clip)
    for typed in (f"a (<rex>:{weight}) in a park", f"a <rex:{weight}> in a park"):
        assert distance(draw(typed), expected) < 1e-4
    assert distance(draw("a <rex> in a park"), expected) > 1e-3


def test_g8_a_weight_is_the_strength_of_a_prompt_activated_concept(studio, draw, mixed):
    prompt, plain = "a <blueprint:0.4> of a car", "a <blueprint> of a car"
    weighed, half = studio.aggregate(prompt, mixed), studio.aggregate(plain, mixed, strength=0.4)
    assert distance(draw(weighed[2], weighed[0]), draw(half[2], half[0])) < 1e-4
    scenes = [studio.regional(text, bank=mixed, strength=strength)
              for text, strength in ((prompt, 1.0), (plain, 0.4), (plain, 1.0))]
    assert distance(scenes[0], scenes[1]) < 1e-4 < distance(scenes[0], scenes[2])


def test_g8_sibling_in_regions(studio, mixed):
    def inside(text, strength=1.0):
        return studio.regional("a meadow", [studio.region(text, right=0.5)], mixed, strength=strength)

    for text, name in (("a <rex{}>", "rex"), ("a <blueprint{}>", "blueprint")):
        weighed, half, plain = inside(text.format(":0.4")), inside(f"a <{name}>", 0.4), inside(f"a <{name}>")
        assert distance(weighed, half) < 1e-4 < distance(weighed, plain)


def test_g8_sibling_words_without_deltas_are_weighed_as_text(draw):
    assert distance(draw("a (<plain>:1.5)"), draw("a <plain>")) > 1e-3
    assert torch.equal(draw("a (<plain>:1.5)"), draw("a <plain:1.5>"))


def told(caplog) -> list[str]:
    """Our messages in the log; ComfyUI's own stand there, too."""
    return [message for message in caplog.messages if message.startswith("Continual Concepts")]


def test_g8_sibling_a_weight_that_does_not_act_is_told(studio, mixed, caplog):
    _, clip, _ = studio.aggregate("a <blueprint>", mixed)
    assert not told(caplog)
    studio.encode(clip, "a <blueprint:1.5>")
    studio.encode(clip, "a <blueprint:1.5>")
    assert len(told(caplog)) == 1 and "acts on its words as on text" in told(caplog)[0]
    _, clip, _ = studio.aggregate("a dog", mixed)
    studio.encode(clip, "a <blueprint>")
    assert "its words act without its deltas" in told(caplog)[-1]


def test_g8_sibling_names_without_brackets_are_told_in_the_log(studio, carrying, caplog):
    studio.encode(carrying[1], "a photo of mimi")
    assert len(told(caplog)) == 1 and told(caplog)[0].endswith("for the concept write <mimi>")


# ----- G5: nodes that compute with conditionings -----


# ----- F3: notes in ComfyUI -----

def test_f3_sibling_a_note_is_told_by_the_node_that_runs(studio, mixed, monkeypatch):
    from continual_concepts.nodes import apply

    told = []
    monkeypatch.setattr(apply, "tell", told.append)
    _, clip, _ = studio.aggregate("a photo of rex", mixed)
    assert told == ["'rex' is plain text in the prompt; for the concept write <rex>"]
    studio.encode(clip, "a photo of rex")
    assert len(told) == 1      # each note once
    studio.encode(clip, "<rex,> with mimi")
    assert told[1] == ("'<rex,>' is plain text in the prompt; for the concept write <rex>\n"
                       "'mimi' is plain text in the prompt; for the concept write <mimi>")


# ----- F2: negative prompts -----

@pytest.mark.parametrize("name", ["rex", "blueprint"])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("crops", [0.0, 0.5])
def test_f2_sibling_a_concept_in_the_negative_prompt_acts_in_comfyui(studio, mixed, name, regions, crops):
    """With its words and its deltas, whichever way its deltas act."""
    without = mixed.replace(replace(mixed[name], deltas={}))

    def picture(bank, negative="", own=""):
        areas = [studio.region("a cat", right=0.5, negative=own)] if regions else []
        return studio.regional("a dog", areas, bank, negative_scene=negative, solo=crops if regions else 0.0)

    plain, named, words = picture(mixed), picture(mixed, f"<{name}>"), picture(without, f"<{name}>")
    assert min(distance(named, words), distance(words, plain)) > 1e-3
    assert torch.equal(picture(without), plain)
    if regions:
        assert distance(picture(mixed, own=f"<{name}>"), picture(without, own=f"<{name}>")) > 1e-3


@pytest.mark.parametrize("name", ["rex", "blueprint"])
def test_f2_sibling_both_hosts_predict_negative_prompts_alike(studio, reference, mixed, name):
    """One step from pure noise, guided, against the diffusers host."""
    import comfy.sample

    from continual_concepts.core.attention.token_lora import TokenLoraProcessor
    from continual_concepts.core.sampling import sampling

    negative, positive = mixed.parse(f"a photo of <{name}:0.6>"), mixed.parse("a photo of <mimi>")
    ours = studio.regional(positive.text, bank=mixed, negative_scene=negative.text, steps=1, cfg=4.0)
    ours = studio.model.model.process_latent_in(ours)
    noise = comfy.sample.prepare_noise(studio.latent()["samples"], 1)
    sigma = studio.model.model.model_sampling.sigma_max
    settings_of = sampling.SampleSettings()
    deltas = sampling.word_bound_deltas(reference, mixed, [positive], negative, settings_of)
    contexts = (sampling.encode_negative(reference, mixed, negative, [positive], "sharp"),
                sampling.encode(reference, mixed, [positive]))
    epsilon = sampling.guided(reference, noise, 999, *contexts, 4.0, TokenLoraProcessor(deltas))
    theirs = (1 + sigma**2).sqrt() * noise - sigma * epsilon
    assert distance(ours, theirs) < 1e-4

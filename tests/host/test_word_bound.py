"""Word-bound concepts in ComfyUI: the predictions of the diffusers host, no effect on prompts without their
words, and no traces."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from continual_concepts.core.attention.token_lora import TokenLoraProcessor
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.conditioning.routing import token_lora_deltas

pytestmark = pytest.mark.usefixtures("as_in_comfyui")
SCENE = "a photo of a red dog on a beach"


@pytest.fixture(scope="module")
def word_bound(bank):
    """The bank of the other tests with word-bound concepts, one of them encoded together with the prompt."""
    made = ConceptBank(bank.layout)
    for concept, placeholder_noun in zip(bank, ("dog", "duck toy", ""), strict=True):
        tokens = replace(concept.tokens, placeholder_noun=placeholder_noun)
        made = made.add(replace(concept, info=replace(concept.info, method="bound"), tokens=tokens))
    return made


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


TOLERANCE = 1e-3


@torch.no_grad()
@pytest.mark.parametrize("prompt",
                         ["a photo of <rex> in a meadow", "<rex> and <mimi> at night",
                          "<blueprint> of <mimi>"])
def test_the_stock_nodes_predict_what_core_predicts(studio, reference, word_bound, prompt):
    """CLIP Text Encode and one KSampler step from pure noise, against the diffusers host."""
    import comfy.sample

    model, clip, _ = studio.aggregate("", word_bound)
    latent = studio.latent()["samples"]
    ours = model.model.process_latent_in(studio.ksampler(model, studio.encode(clip, prompt),
                                                         studio.encode(clip, ""), steps=1, cfg=1.0))
    noise, sigma = comfy.sample.prepare_noise(latent, 1), model.model.model_sampling.sigma_max
    named = [name for name in word_bound.names if f"<{name}>" in prompt]
    context = encode_prompts(reference, word_bound.vocabulary.parse_all([prompt]),
                             {name: word_bound[name].tokens for name in named})

    def denoised(processor):
        output, t = reference.predict(noise, torch.tensor([999]), context, processor), torch.tensor([999])
        return (1 + sigma**2).sqrt() * noise - sigma * reference.schedule.to_epsilon(output, noise, t)

    theirs = denoised(TokenLoraProcessor(token_lora_deltas(word_bound, 1.0, named)))
    assert distance(ours, theirs) < 1e-4 < distance(denoised(None), theirs)


@pytest.mark.parametrize("prompt", ["<rex> and <mimi> at night", "<blueprint> of <mimi>, <rex-2>"])
def test_words_are_encoded_apart_as_in_core(studio, reference, word_bound, prompt):
    from continual_concepts.core.comfy.apply import context_of

    _, clip, _ = studio.aggregate("", word_bound)
    ours = context_of(studio.encode(clip, prompt), word_bound.layout.copies, word_bound.names)
    theirs = encode_prompts(reference, word_bound.vocabulary.parse_all([prompt]),
                            {concept.name: concept.tokens for concept in word_bound})
    assert distance(ours.hidden, theirs.hidden) < 1e-5 and ours.words == theirs.words


def test_concepts_whose_words_have_the_same_vectors_are_told_apart(studio, reference, bank, slotted):
    """Words of slots are their class noun, so all dogs of a bank have the same ones."""
    from continual_concepts.core.comfy.apply import context_of

    dogs = ConceptBank(bank.layout)
    for number, concept in enumerate(list(bank)[:2]):
        vectors = {name: vector[:1, :1].expand(-1, 2, -1)
                   for name, vector in bank["rex"].tokens.vectors.items()}
        tokens = replace(concept.tokens, vectors=vectors, placeholder_noun="dog")
        dog = replace(concept, info=replace(concept.info, method="bound"), tokens=tokens, deltas={})
        dogs = dogs.add(slotted(dog, bank.layout, 2 + number))
    _, clip, _ = studio.aggregate("", dogs)
    for prompt in ("a photo of <rex>", "<mimi> beside <rex>", "<rex-2> and a (<mimi>:0.5)"):
        ours = context_of(studio.encode(clip, prompt), dogs.layout.copies, dogs.names)
        theirs = encode_prompts(reference, dogs.vocabulary.parse_all([prompt]),
                                {concept.name: concept.tokens for concept in dogs},
                                by_strength=set(dogs.names))
        assert distance(ours.hidden, theirs.hidden) < 1e-5
        assert ours.words == theirs.words and ours.strengths == theirs.strengths


def test_the_rest_of_a_prompt_is_encoded_as_without_concepts(studio, word_bound):
    _, clip, _ = studio.aggregate("", word_bound)
    named = studio.encode(clip, "a photo of <rex> on a beach")[0][0]
    plain = studio.encode(studio.clip, "a photo of a dog on a beach")[0][0]
    same = (named == plain).all(-1)[0]
    assert same.sum() == len(same) - 2      # its two words


def test_weights_of_words_reach_word_bound_concepts(studio, word_bound):
    model, clip, negative = studio.aggregate("", word_bound)
    prompts = [studio.encode(clip, f"a photo of {word} and <mimi>") for word in ("<rex>", "(<rex>:1.3)")]
    plain, heavy = (studio.ksampler(model, prompt, negative) for prompt in prompts)
    assert TOLERANCE < distance(heavy, plain) < 1


def test_prompts_without_its_words_are_plain_comfyui_bit_for_bit(studio, word_bound):
    model, clip, positive = studio.aggregate(SCENE, word_bound)
    ours = studio.ksampler(model, positive, studio.encode(clip, "blurry"), studio.latent(2))
    assert torch.equal(ours, studio.ksampler(studio.model, SCENE, "blurry", studio.latent(2)))
    assert torch.equal(studio.regional(SCENE, bank=word_bound, negative_scene="blurry"),
                       studio.ksampler(studio.model, SCENE, "blurry"))


def test_no_weight_is_patched(studio, word_bound):
    model, _, _ = studio.aggregate("<rex> and <mimi>", word_bound)
    assert not model.patches


def test_any_prompt_of_the_clip_has_the_concepts(studio, word_bound):
    """One ElasticWeightAggregate serves every prompt; its own prompt does not matter."""
    one, clip, _ = studio.aggregate("nothing", word_bound)
    other, _, positive = studio.aggregate("a photo of <rex>", word_bound)
    negative = studio.encode(clip, "")
    assert torch.equal(studio.ksampler(one, studio.encode(clip, "a photo of <rex>"), negative),
                       studio.ksampler(other, positive, negative))


def test_a_b_a(studio, word_bound):
    def run(prompt, sampler):
        model, clip, positive = studio.aggregate(prompt, word_bound)
        return studio.ksampler(model, positive, studio.encode(clip, ""), sampler=sampler)

    for sampler in ("euler", "euler_ancestral"):
        first, second, third = (run(prompt, sampler) for prompt in ("a <rex>", "a <mimi>", "a <rex>"))
        assert torch.equal(first, third) and not torch.equal(first, second)
    assert torch.equal(studio.ksampler(studio.model, SCENE, ""), studio.ksampler(studio.model, SCENE, ""))


def test_strength_and_one_concept(studio, word_bound):
    pictures = []
    for strength in (0.0, 0.5, 1.0):
        model, clip, positive = studio.aggregate("a <rex> and <mimi>", word_bound, strength=strength)
        pictures.append(studio.ksampler(model, positive, studio.encode(clip, "")))
    model, clip, positive = studio.aggregate("a <rex> and <mimi>", word_bound, "one concept", concept="rex")
    pictures.append(studio.ksampler(model, positive, studio.encode(clip, "")))
    assert all(not torch.equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])


def test_a_region_over_everything_is_its_prompt(studio, word_bound):
    model, clip, positive = studio.aggregate("a <rex> and <mimi>", word_bound)
    whole = studio.ksampler(model, positive, studio.encode(clip, ""))
    inside = studio.regional("a meadow", [studio.region("a <rex> and <mimi>")], word_bound)
    assert distance(inside, whole) < 1e-4


@pytest.mark.parametrize("noise", [False, True])
def test_regions_and_a_scene_with_concepts(studio, word_bound, noise):
    regions = [studio.region("a <rex>", right=0.5, top=0.3), studio.region("a <mimi>", left=0.5, top=0.3)]

    def picture(scene, regions):
        return studio.regional(scene, regions, word_bound, region_noise=noise)

    first = picture("a photo of <blueprint>", regions)
    assert torch.equal(first, picture("a photo of <blueprint>", regions)) and torch.isfinite(first).all()
    assert not torch.equal(first, picture("a photo of a drawing", regions))
    plain = [studio.region("a dog", right=0.5, top=0.3), studio.region("a cat", left=0.5, top=0.3)]
    assert distance(picture("a photo of <blueprint>", plain), first) > TOLERANCE


def test_two_aggregates_in_a_row(studio, word_bound):
    rest = word_bound.remove("rex")
    only = word_bound
    for name in rest.names:
        only = only.remove(name)
    model, clip, _ = studio.aggregate("", rest)
    model, clip, _ = studio.aggregate("<rex>", only, model=model, clip=clip)
    positive = studio.encode(clip, "<rex> and <mimi>")
    together, whole_clip, whole = studio.aggregate("<rex> and <mimi>", word_bound)
    theirs = studio.ksampler(together, whole, studio.encode(whole_clip, ""))
    assert torch.equal(studio.ksampler(model, positive, studio.encode(clip, "")), theirs)


def test_regions_on_a_model_that_has_the_concepts_already(studio, word_bound):
    model, clip, _ = studio.aggregate("", word_bound)
    regions = [studio.region("a <rex>", right=0.5)]
    assert torch.equal(studio.regional("a meadow", regions, word_bound, model=model, clip=clip),
                       studio.regional("a meadow", regions, word_bound))


def test_prompts_of_different_length_share_a_batch(studio, word_bound, monkeypatch):
    """The same picture as with each prompt evaluated alone, as ComfyUI does it where memory is short."""
    long = "a <rex>, " + "very " * 90 + "green"
    model, clip, _ = studio.aggregate("", word_bound)
    for positive, negative in ((long, "a <mimi>"), ("a <rex>", long)):
        conditionings = studio.encode(clip, positive), studio.encode(clip, negative)
        together = studio.ksampler(model, *conditionings)
        with monkeypatch.context() as scarce:
            scarce.setattr(type(model.model), "memory_required", lambda *args, **kwargs: 1e30)
            assert distance(studio.ksampler(model, *conditionings), together) < 1e-4


def test_learning_in_comfyui(studio, word_bound):
    bank = studio.learn(name="spot", method="bound", bank=[word_bound])
    assert bank["spot"].info.method == "bound" and bank.names[:-1] == word_bound.names
    model, clip, positive = studio.aggregate("a <spot> and <rex>", bank)
    assert torch.isfinite(studio.ksampler(model, positive, studio.encode(clip, ""))).all()


@pytest.mark.parametrize("method, settings", [("slots", {}), ("bound", {"layerwise": False})])
def test_a_bank_without_layer_wise_words_works_with_stock_nodes(studio, method, settings):
    bank = studio.learn(name="spot", method=method, method_settings=[settings])
    assert bank["spot"].tokens.copies == 1 < bank.layout.copies
    model, clip, positive = studio.aggregate("a <spot>", bank)
    negative = studio.encode(clip, "a cat")
    drawn = studio.ksampler(model, positive, negative)
    plain = studio.ksampler(studio.model, "a dog", "a cat")
    assert torch.isfinite(drawn).all() and distance(drawn, plain) > 1e-4
    model, clip, positive = studio.aggregate("a cat", bank)
    assert torch.equal(studio.ksampler(model, positive, studio.encode(clip, "a dog")),
                       studio.ksampler(studio.model, "a cat", "a dog"))


def test_another_nodes_attention_stays_on_top(studio, word_bound):
    """As an image prompt adapter does it: plain attention and something more."""
    from comfy.ldm.modules.attention import optimized_attention

    def replaced(size):
        other = studio.model.clone()
        for kind, number, index in find_addresses(studio):
            other.set_model_attn2_replace(
                lambda q, k, v, options: optimized_attention(q, k, v,
                                                             options["n_heads"]) + size * torch.ones_like(q),
                                          kind, number, index)
        return other

    def run(model, regions=()):
        if regions:
            return studio.regional("a photo of <mimi>", regions, word_bound, model=model)
        ours, clip, positive = studio.aggregate("a <rex>", word_bound, model=model)
        return studio.ksampler(ours, positive, studio.encode(clip, ""))

    for regions in ([], [studio.region("a <rex>", right=0.5, top=0.3)]):
        plain = run(studio.model, regions)
        neutral, strong = (distance(run(replaced(size), regions), plain) for size in (0.0, 0.2))
        assert neutral < 1e-4 < strong


def find_addresses(studio):
    from continual_concepts.core.comfy.families import find_sites
    from continual_concepts.core.comfy.text import text_widths

    return list(find_sites(studio.model, text_widths(studio.clip)).addresses)

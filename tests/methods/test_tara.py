"""TARA, ToVA and the plain control: where their deltas act, and TARA's alignment."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from continual_concepts.core.attention.token_lora import TokenLoraProcessor
from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.composition import Composition, Kind
from continual_concepts.core.bank.format import open_bank, save_bank
from continual_concepts.core.conditioning.encoding import encode_prompts
from continual_concepts.core.conditioning.routing import aggregate, token_lora_deltas
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import make
from continual_concepts.core.methods.tara import FREE, TaraProcessor
from continual_concepts.core.methods.tova import PROMPTS, KeyLock, LockedKeys, mean_states
from continual_concepts.core.sampling.sampling import encode, encode_negative, sample, word_bound_deltas
from continual_concepts.core.sampling.settings import SampleSettings

QUICK = SampleSettings(steps=3, cfg=2.0, size=(32, 32))


def learned(backbone, teach, method, **settings):
    bank = ConceptBank(backbone.layout)
    for name, noun in (("rex", "dog"), ("mimi", "cat")):
        bank = teach(backbone, bank, name, method, {"lr": 0.1, **settings}, noun=noun, steps=4).bank
    return bank


@pytest.fixture(scope="module")
def tara(slim_backbone, teach):
    return learned(slim_backbone, teach, "tara")


def test_tara_binds_keys_and_values_and_folds_the_others(tara):
    folded = aggregate(None, tara, tara.parse("<rex>"), "sharp").deltas
    assert {projection for _, projection in folded} == {"to_q", "to_out"}
    bound = token_lora_deltas(tara)["rex"]
    assert {projection for _, projection in bound} == {"to_k", "to_v"}
    assert len(folded) + len(bound) == len(tara["rex"].deltas)
    assert not aggregate(None, tara, tara.parse("a dog"), "sharp").deltas


def test_tara_in_a_prompt_without_concepts_is_the_base(slim_backbone, tara):
    plain = sample(slim_backbone, ConceptBank(slim_backbone.layout), ["a dog"], [0], QUICK)
    assert torch.equal(plain, sample(slim_backbone, tara, ["a dog"], [0], QUICK))


@pytest.mark.parametrize("mode", ["sharp", "equal"])
def test_in_a_negative_prompt_alone_all_deltas_act(slim_backbone, tara, mode):
    """What the negative half reads is the same as with the deltas of q and out in the weights."""
    negative, positive = tara.parse("a (<rex>:0.5)"), [tara.parse("a <mimi>")]
    settings = replace(QUICK, mode=mode)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    time = torch.tensor([500])
    context = encode_negative(slim_backbone, tara, negative, positive, mode)
    deltas = word_bound_deltas(slim_backbone, tara, positive, negative, settings)
    ours = slim_backbone.predict(noise, time, context, TokenLoraProcessor(deltas))
    words = TokenLoraProcessor({"rex": token_lora_deltas(tara)["rex"]})
    plain = encode(slim_backbone, tara, [negative])
    with slim_backbone.folded(aggregate(None, tara, negative, "sharp").deltas):
        whole = slim_backbone.predict(noise, time, plain, words)
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, slim_backbone.predict(noise, time, plain, words), atol=1e-3)
    named = encode_negative(slim_backbone, tara, negative, [negative], mode)      # folded by its prompt
    assert named.words == plain.words


def test_training_and_sampling_agree(slim_backbone, tara):
    """The processor of training gives the prediction of sampling: folded q and out, word-bound k and v."""
    deltas = tara["rex"].deltas
    bound = {key: delta for key, delta in deltas.items() if key[1] not in FREE}
    free = {key: delta for key, delta in deltas.items() if key[1] in FREE}
    context = encode_prompts(slim_backbone, [tara.parse("a <rex> here")], tara.token_groups(["rex"]))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    time = torch.tensor([500])
    trained = slim_backbone.predict(noise, time, context, TaraProcessor("rex", bound, free))
    folded = aggregate(None, tara, tara.parse("<rex>"), "sharp").deltas
    with slim_backbone.folded(folded):
        words = TokenLoraProcessor({"rex": token_lora_deltas(tara)["rex"]})
        sampled = slim_backbone.predict(noise, time, context, words)
    torch.testing.assert_close(trained, sampled, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(trained, slim_backbone.predict(noise, time, context, None), atol=1e-3)


def test_the_alignment_is_the_distance_of_keys(slim_backbone, tara):
    bound = {key: delta for key, delta in tara["rex"].deltas.items() if key[1] not in FREE}
    processor = TaraProcessor("rex", bound, {})
    prompts = [tara.parse("a <rex>"), tara.parse("a dog")]
    context = encode_prompts(slim_backbone, prompts, tara.token_groups(["rex"]))
    first, second = context.words[0]["rex"]
    processor.prepare(context)
    expected = []
    for site in slim_backbone.layout.sites:
        text = context.at(site)
        weight = torch.randn(site.shape("to_k"), generator=torch.Generator().manual_seed(site.index))
        y = text @ weight.T
        processor.project(site, "to_k", text, y)
        key = y[0, first] + bound[site.index, "to_k"].apply(text)[0, first]
        expected.append((key - y[0, second]).abs().mean())
    torch.testing.assert_close(processor.take(), torch.stack(expected).mean())
    processor.project(site, "to_k", text, y)      # a block that is computed again
    assert len(processor.distances) == len(expected)


def test_the_alignment_moves_keys_to_the_noun(slim_backbone, teach):
    def last_distance(weight):
        infos = []
        teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", "tara",
              {"lr": 0.02, "alignment": weight}, steps=12, callback=infos.append)
        return infos[0].terms["alignment"] / weight, infos[-1].terms["alignment"] / weight

    (start, free), (_, pulled) = last_distance(1e-6), last_distance(10.0)
    assert pulled < 0.8 * start and pulled < 0.8 * free


def test_tova_adapts_values_at_its_words_alone(slim_backbone, teach):
    concept = learned(slim_backbone, teach, "tova")["rex"]
    assert {projection for _, projection in concept.deltas} == {"to_v"}
    assert concept.info.composes == Composition(Kind.WORDS)


def test_the_control_has_no_penalty_and_the_bytes_of_the_default(slim_backbone, teach):
    control = learned(slim_backbone, teach, "lora")
    default = learned(slim_backbone, teach, "bound")
    assert control["rex"].info.composes == Composition(Kind.PROMPT)
    assert abs(control["rex"].nbytes() - default["rex"].nbytes()) < 64
    keys_only = learned(slim_backbone, teach, "lora", projections="kv")["rex"]
    assert {projection for _, projection in keys_only.deltas} == {"to_k", "to_v"}


def test_the_control_is_cidm_without_its_terms(slim_backbone, teach):
    off = {"orthogonality": "off", "shared": "off", "attention_weight": 0.0, "token_norm_stop": 0.0}
    control, stripped = learned(slim_backbone, teach, "lora"), learned(slim_backbone, teach, "cidm", **off)
    for name in ("rex", "mimi"):
        for key, delta in control[name].deltas.items():
            pairs = zip(delta.tensors(), stripped[name].deltas[key].tensors(), strict=True)
            assert all(torch.equal(*pair) for pair in pairs)
        assert all(torch.equal(vector, stripped[name].tokens.vectors[encoder])
                   for encoder, vector in control[name].tokens.vectors.items())


def test_projections_are_checked():
    with pytest.raises(ConceptError, match="projections.*qkvo"):
        make("lora", {"projections": "kq"})


def test_the_file_keeps_which_projections_are_free(tara, tmp_path):
    save_bank(tara, tmp_path / "bank.safetensors")
    opened = open_bank(tmp_path / "bank.safetensors")
    assert opened["rex"].info.composes == Composition(Kind.WORDS, free=("to_q", "to_out"))
    assert "free" not in Composition(Kind.WORDS).to_json()
    with pytest.raises(ConceptError, match="free a list of"):
        Composition.from_json({"kind": "bound", "free": ["to_x"]})


@pytest.mark.parametrize(("free", "folded"), [
    ("", set()), ("qo", {"to_q", "to_out"}), ("kv", {"to_k", "to_v"}),
    ("qkvo", {"to_q", "to_k", "to_v", "to_out"}),
])
def test_each_projection_can_be_word_bound_or_prompt_activated(slim_backbone, teach, free, folded):
    """The four corners, with the same words; training and sampling agree in each."""
    given = []
    settings, empty = {"lr": 0.1, "free": free}, ConceptBank(slim_backbone.layout)
    learned = teach(slim_backbone, empty, "rex", "bound", settings, steps=2,
                    callback=lambda info: given.append(info.snapshot()["rex"].info.composes))
    bank, concept = learned.bank, learned.concept
    deltas = aggregate(None, bank, bank.parse("<rex>"), "sharp").deltas
    assert {projection for _, projection in deltas} == folded
    assert given[-1] == concept.info.composes == Composition(Kind.WORDS, free=concept.info.composes.free)
    bound = token_lora_deltas(bank)["rex"]
    assert len(bound) + len(deltas) == len(concept.deltas)
    context = encode_prompts(slim_backbone, [bank.parse("a <rex> here")], bank.token_groups(["rex"]))
    noise, time = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    free_deltas = {key: delta for key, delta in concept.deltas.items() if key[1] in folded}
    trained = slim_backbone.predict(noise, time, context, TokenLoraProcessor({"rex": bound}, free_deltas))
    with slim_backbone.folded(deltas):
        sampled = slim_backbone.predict(noise, time, context, TokenLoraProcessor({"rex": bound}))
    torch.testing.assert_close(trained, sampled, rtol=1e-4, atol=1e-5)


def test_locked_keys_are_the_nouns(slim_backbone, teach):
    """The record maps the mean states of the words to the noun's key, with as many ranks as words."""
    settings = {"lr": 0.1, "lock_keys": True, "stored": "float32"}
    bank = teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", "tova", settings, steps=3).bank
    concept = bank["rex"]
    assert {projection for _, projection in concept.deltas} == {"to_k", "to_v"}
    noun = encode_prompts(slim_backbone, [bank.parse("a photo of dog")], {})
    prompts = bank.vocabulary.parse_all([template.format("<rex>") for template in PROMPTS])
    context = encode_prompts(slim_backbone, prompts, bank.token_groups(["rex"]))
    for site in slim_backbone.layout.sites:
        target = slim_backbone.project(site, "to_k", noun.at(site))[0, 4]
        states, delta = mean_states(context, "rex", site), concept.deltas[site.index, "to_k"]
        plain = slim_backbone.project(site, "to_k", states)
        assert delta.up.shape[1] == 2 and (plain - target).norm() > 0.1
        torch.testing.assert_close(plain + delta.apply(states), target.expand(2, -1), rtol=1e-3, atol=1e-3)
    with pytest.raises(ConceptError, match="lock_keys"):
        make("tova", {"lock_keys": True, "projections": "qkvo"})


def test_locked_keys_follow_the_words_while_they_train(slim_backbone, tara):
    """In a pass with one prompt, every key of the concept is the noun's."""
    lock = KeyLock(slim_backbone, "dog")
    processor = LockedKeys("rex", {}, lock)
    prompts = tara.vocabulary.parse_all(["a <rex> here", "a dog"])
    context = encode_prompts(slim_backbone, prompts, tara.token_groups(["rex"]))
    processor.prepare(context)
    places = list(context.words[0]["rex"])
    for site, key in lock.keys.items():
        text = context.at(site)
        plain = slim_backbone.project(site, "to_k", text)
        found = processor.project(site, "to_k", text, plain)
        torch.testing.assert_close(found[0, places], key.expand(2, -1), rtol=1e-3, atol=1e-3)
        others = [n for n in range(text.shape[1]) if n not in places]
        assert torch.equal(found[0, others], plain[0, others]) and torch.equal(found[1], plain[1])
    assert lock.edits(context[1:2], "rex") == {}

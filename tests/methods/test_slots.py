"""Slots: what an object and a style train, and how they act."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.composition import Composition, Kind
from continual_concepts.core.bank.format import open_bank, save_bank
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.interop.export import export_concept
from continual_concepts.core.interop.prompt_export import export_prompt
from continual_concepts.core.methods import Task, make
from continual_concepts.core.model.deltas import LowRankDelta
from continual_concepts.core.model.slots import SLOTS, SlotDelta
from continual_concepts.core.sampling.sampling import sample
from continual_concepts.core.sampling.settings import SampleSettings

QUICK = SampleSettings(steps=3, cfg=2.0, size=(32, 32))
FAST = {"lr": 1e-2}


@pytest.fixture(scope="module")
def bank(slim_backbone, teach):
    bank = ConceptBank(slim_backbone.layout)
    for name, noun, kind in (("rex", "dog", "object"), ("mimi", "cat", "object"),
                             ("chalk", "drawing", "style")):
        bank = teach(slim_backbone, bank, name, "slots", FAST, noun=noun, kind=kind, steps=4).bank
    return bank


def test_an_object_is_slots_at_every_site(slim_backbone, bank):
    deltas = bank["rex"].deltas
    assert set(deltas) == {(site.index, SLOTS) for site in slim_backbone.layout.sites}
    assert all(isinstance(delta, SlotDelta) and delta.shape[0] == 8 and delta.value.any()
               for delta in deltas.values())
    assert bank.infos["rex"].composes.kind is Kind.WORDS


def test_the_words_of_an_object_are_its_class_noun(slim_backbone, bank):
    for encoder in slim_backbone.text:
        noun = encoder.vectors(encoder.ids("dog"))[-1].half()
        words = bank["rex"].tokens.vectors[encoder.name]
        assert words.shape[:2] == (1, 4) and torch.equal(words[0, -1].half(), noun)


def test_words_without_a_class_noun_are_learned(slim_backbone):
    method = make("slots")
    method.begin(Task("rex", "", slim_backbone, ConceptBank(slim_backbone.layout), words=("rex-1",)))
    assert all(parameter.requires_grad for parameter in method.words.parameters())
    assert len(method.parameter_groups()) == 2


def test_learned_words_change(slim_backbone, teach):
    bank = teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", "slots",
                 {**FAST, "learn_words": True}, steps=2).bank
    for encoder in slim_backbone.text:
        words = bank["rex"].tokens.vectors[encoder.name]
        assert words.shape[0] == slim_backbone.layout.copies
        assert not torch.equal(words[0, -1], encoder.vectors(encoder.ids("dog"))[-1])


def test_a_style_is_the_control(slim_backbone, teach, bank):
    control = teach(slim_backbone, ConceptBank(slim_backbone.layout), "chalk", "lora", noun="drawing",
                    kind="style", steps=4).bank["chalk"]
    style = bank["chalk"]
    assert style.info.composes == control.info.composes and style.info.composes.kind is Kind.PROMPT
    assert style.deltas.keys() == control.deltas.keys()
    for key, delta in style.deltas.items():
        assert isinstance(delta, LowRankDelta) and torch.equal(delta.up, control.deltas[key].up)
        assert torch.equal(delta.down, control.deltas[key].down)
    assert all(torch.equal(v, control.tokens.vectors[k]) for k, v in style.tokens.vectors.items())


def test_a_saved_bank_draws_the_same_picture(slim_backbone, bank, tmp_path):
    save_bank(bank, tmp_path / "bank.safetensors")
    prompts = ["a <rex> and a <mimi>, <chalk>"]
    again = sample(slim_backbone, open_bank(tmp_path / "bank.safetensors"), prompts, [1], QUICK)
    assert torch.equal(sample(slim_backbone, bank, prompts, [1], QUICK), again)


def test_a_concept_in_half_precision_draws_on_a_base_in_single_precision(slim_backbone, bank, teach):
    halves = teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", "slots",
                   {**FAST, "stored": "float16"}, steps=4).bank
    assert halves["rex"].deltas[0, SLOTS].key.dtype == torch.float16
    pictures = [sample(slim_backbone, one, ["a photo of <rex>"], [0], QUICK) for one in (bank, halves)]
    assert torch.allclose(*pictures, atol=0.05)


def test_a_picture_does_not_depend_on_the_order_of_learning(slim_backbone, bank):
    other = ConceptBank(bank.layout).add(bank["mimi"]).add(bank["rex"])
    one, two = (sample(slim_backbone, b, ["a <rex> and a <mimi>"], [1], QUICK) for b in (bank, other))
    assert torch.equal(one, two)
    assert not torch.equal(one, sample(slim_backbone, bank, ["a dog and a cat"], [1], QUICK))


def test_strength_zero_is_the_base_with_the_noun(slim_backbone, bank):
    settings = {strength: replace(QUICK, strength=strength) for strength in (1.0, 0.0)}
    full, none = (sample(slim_backbone, bank, ["a <rex>"], [1], settings[s]) for s in (1.0, 0.0))
    rex = bank["rex"]
    empty = ConceptBank(bank.layout).add(replace(rex, deltas={key: delta.scaled(0.0)
                                                              for key, delta in rex.deltas.items()}))
    assert not torch.equal(full, none)
    assert torch.allclose(none, sample(slim_backbone, empty, ["a <rex>"], [1], QUICK), atol=1e-6)


@pytest.mark.parametrize("composition", [Composition(Kind.PROMPT), Composition(Kind.SUM), None])
def test_slots_need_words(slim_backbone, bank, composition):
    """Slots that would be summed into weights are a damaged record."""
    rex = bank["rex"]
    with pytest.raises(ConceptError, match="has slots, which act through its words, and its composition is"):
        replace(rex, info=replace(rex.info, composition=composition)).check_fits(bank.layout)


def test_a_record_of_no_slots_is_damage(bank):
    rex = bank["rex"]
    empty = {key: replace(delta, key=delta.key[:0], value=delta.value[:0])
             for key, delta in rex.deltas.items()}
    with pytest.raises(ConceptError, match="no slots at site 0"):
        replace(rex, deltas=empty).check_fits(bank.layout)


def test_slots_are_not_exported_as_a_lora(bank, tmp_path):
    with pytest.raises(ConceptError, match="'rex' was learned as slots, which no other program reads"):
        export_concept(bank, "rex", tmp_path)
    with pytest.raises(ConceptError, match="'rex' was learned as slots, which no other program reads"):
        export_prompt(bank, "a photo of <rex> and <mimi>", tmp_path)
    assert export_concept(bank, "chalk", tmp_path).files
    assert any("slots hold most" in note for note in export_prompt(bank, "<chalk> of <rex>", tmp_path).notes)


@pytest.mark.parametrize("count", [0, 65])
def test_the_number_of_slots_is_bounded(count):
    with pytest.raises(ConceptError, match="slots"):
        make("slots", {"slots": count})

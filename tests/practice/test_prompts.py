"""Prompts as people type them: near misses, weights, names without brackets, concepts in negative prompts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.concepts import ConceptInfo
from continual_concepts.core.bank.hints import notes_on
from continual_concepts.core.bank.prompts import Vocabulary
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.regional.regions import Region
from continual_concepts.core.sampling.found import sample_found
from continual_concepts.core.sampling.regions import sample_regions
from continual_concepts.core.sampling.sampling import sample
from continual_concepts.core.sampling.settings import SampleSettings

SETTINGS = SampleSettings(steps=2, cfg=3.0, size=(32, 32))


def known(*names: str) -> Vocabulary:
    return Vocabulary([ConceptInfo(name, "dog", "bound", (f"{name}-1", f"{name}-2")) for name in names])


def notes(prompt: str, *names: str) -> list[str]:
    vocabulary = known(*(names or ("dog",)))
    return notes_on(vocabulary, [vocabulary.parse(prompt)])


def weights(prompt: str, *names: str) -> dict[str, tuple[float, ...]]:
    parsed = known(*(names or ("dog",))).parse(prompt)
    return {name: parsed.weights_of(name) for name in parsed.concepts}


@pytest.mark.parametrize("name", ["rex", "Rex", "REX"])
def test_a_note_names_the_concept_in_the_case_that_was_typed(name):
    for typed, written in ((f"<{name}:nan>", f"<{name}>"), (f"<{name}:0,5>", f"<{name}:0.5>"),
                           (name, f"<{name}>")):
        assert notes(f"a photo of {typed}", "rex", "Rex", "REX") == [
            f"'{typed}' is plain text in the prompt; for the concept write {written}"]


@pytest.mark.parametrize(("typed", "weight"), [
    ("<dog:0.8>", 0.8), ("<dog >", 1.0), ("< dog >", 1.0), ("<dog: 0.8 >", 0.8), ("＜dog＞", 1.0),
    ("＜dog：0.8＞", 0.8), ("<ｄｏｇ>", 1.0), ("(<dog>:1.5)", 1.5), ("(<dog:0.8>)", 0.8),
])
def test_f1_near_misses_that_are_understood(typed, weight):
    prompt = f"a photo of {typed} on grass"
    assert weights(prompt) == {"dog": (weight,)} and not notes(prompt)


@pytest.mark.parametrize(("typed", "hint"), [
    ("<dog,>", "<dog>"), ("<lora:dog:0.8>", "<dog:0.8>"), (r"\<dog\>", "<dog>"), ("<dog:much>", "<dog>"),
    ("<dog:0,8>", "<dog:0.8>"), ("〈dog〉", "<dog>"), ("&lt;dog&gt;", "<dog>"), ("<Dog:1>", "<dog:1>"),
    ("<dgo:0.5>", "<dog:0.5>"), ("[dog]", "<dog>"),
])
def test_f1_near_misses_that_are_text_are_told(typed, hint):
    told = notes(f"a photo of {typed} on grass")
    assert weights(f"a photo of {typed} on grass") == {} and len(told) == 1 and told[0].endswith(hint)


@pytest.mark.parametrize(("stored", "typed"), [("caf\u00e9", "cafe\u0301"), ("\u212bsa", "\u00c5sa")])
def test_f1_letters_are_the_same_in_every_form(stored, typed):
    assert weights(f"<{typed}:0.5>", stored) == {stored: (0.5,)}


def test_f1_sibling_other_programs_syntax_is_told():
    assert "loads no file" in notes("a cat <lora:style:1>")[0]
    assert not notes("a < b > c, 3 <4, (red:1.3) [blue] {green|grey} BREAK")


def test_f1_sibling_weights_that_are_no_numbers(run, learned):
    with pytest.raises(ConceptError, match=r"the weight in '\(dog:inf\)' is inf; allowed: a finite number"):
        known("dog").parse("a (dog:inf)")
    assert "pairs of parentheses" in run("sample", "(" * 300 + ")" * 300, "--bank", learned).sentence


def test_f1_sibling_a_smiley_does_not_disturb_a_weight():
    assert weights("a :) <dog:0.8> and :(") == {"dog": (0.8,)}


def test_f3_a_name_without_brackets_is_told(run, learned, tmp_path):
    out = run("sample", "a photo of rex", "--bank", learned, "--count", 1, "--steps", 1,
              "--base", "embedded", "--output", tmp_path / "a")
    assert out.code == 0
    note = "'rex' is plain text in the prompt; for the concept write <rex>"
    assert out.err.endswith(f"\ncontinual-concepts: note: {note}\n")
    shown = run("--json", "sample", "a dog", "--negative", "Rex", "--bank", learned, "--count", 1,
                "--base", "embedded", "--steps", 1, "--output", tmp_path / "b")
    assert len(json.loads(shown.out)["notes"]) == 1 and not shown.err


def test_f3_sibling_exports_for_a_prompt_tell(run, learned, tmp_path):
    out = run("bank", "export", learned, "--prompt", "<rex> and <lora:rex:1>", "--format", "embedding",
              "--output", tmp_path / "files")
    assert out.code == 0 and "for the concept write <rex:1>" in out.out


@pytest.mark.parametrize("prompt",
                         ["a photo of <rex>, rex is a dog", "a trex", "rex-like", "anorexia", "a dog"])
def test_f3_sibling_no_note_where_there_is_nothing_to_say(prompt):
    assert not notes(prompt, "rex")


def test_f3_sibling_names_of_scripts_without_spaces():
    assert notes("\u4e00\u5f20\u96f7\u514b\u65af\u7684\u7167\u7247", "\u96f7\u514b\u65af")


@pytest.fixture
def bank(tiny_backbone, make_concept):
    """<rex> is word-bound, <mimi> prompt-activated."""
    made = ConceptBank(tiny_backbone.layout)
    for i, (name, method) in enumerate((("rex", "bound"), ("mimi", "cidm"))):
        made = made.add(make_concept(tiny_backbone.layout, name, seed=i, method=method, size=0.5))
    return made


def without_deltas(bank: ConceptBank, name: str) -> ConceptBank:
    return bank.replace(replace(bank[name], deltas={}))


@pytest.mark.parametrize("name", ["rex", "mimi"])
@pytest.mark.parametrize("draw", ["prompt", "region", "found"])
def test_f2_a_concept_in_the_negative_prompt_acts(tiny_backbone, bank, name, draw):
    """With its words and its deltas, with and without regions, whichever way its deltas act."""
    others = "<other> and <third>" if draw == "found" else "a dog"
    whole = bank
    if draw == "found":
        for other in ("other", "third"):
            concept = replace(bank["rex"].renamed(other))
            whole = whole.add(concept)

    def picture(bank: ConceptBank, negative: str):
        settings = replace(SETTINGS, negative=negative)
        if draw == "prompt":
            return sample(tiny_backbone, bank, [others], [1], settings)
        if draw == "found":
            return sample_found(tiny_backbone, bank, others, [1], settings)
        regions = [Region(others, box=(0.0, 0.0, 1.0, 0.5))]
        return sample_regions(tiny_backbone, bank, "a meadow", regions, [1], settings)

    plain = picture(whole, "blurry")
    named, words_alone = (picture(held, f"<{name}>") for held in (whole, without_deltas(whole, name)))
    assert not torch.allclose(named, words_alone, atol=1e-4)
    assert not torch.allclose(words_alone, plain, atol=1e-4)
    assert torch.equal(picture(without_deltas(whole, name), "blurry"), plain)      # only where it is named


def test_f2_sibling_deltas_of_the_negative_prompt_stay_out_of_the_positive_half(tiny_backbone, bank):
    """Without guidance only the positive half is seen."""
    settings = [replace(SETTINGS, cfg=1.0, negative=negative) for negative in ("", "<mimi> and <rex>")]
    pictures = [sample(tiny_backbone, bank, ["a dog"], [1], each) for each in settings]
    assert torch.equal(*pictures)


@pytest.mark.parametrize("name", ["rex", "mimi"])
def test_f1_sibling_a_weight_is_the_strength_of_a_concept(tiny_backbone, bank, name):
    def picture(prompt: str, strength: float = 1.0):
        return sample(tiny_backbone, bank, [prompt], [1], replace(SETTINGS, strength=strength))

    weighted = picture(f"a <{name}:0.4> in a park")
    assert torch.allclose(weighted, picture(f"a <{name}> in a park", 0.4), atol=1e-5)
    assert torch.equal(weighted, picture(f"a (<{name}>:0.4) in a park"))
    assert not torch.allclose(weighted, picture(f"a <{name}> in a park"), atol=1e-4)
    assert torch.equal(picture(f"a <{name}:1.0> in a park"), picture(f"a <{name}> in a park"))

"""Placeholders: parsing, errors that help, captions and plain text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from continual_concepts.core.bank import prompts
from continual_concepts.core.bank.concepts import ConceptInfo
from continual_concepts.core.bank.prompts import (
    NO_CONCEPTS,
    Vocabulary,
    WordRef,
    caption_with_placeholder,
    words_prompt,
)
from continual_concepts.core.errors import ConceptError

REX = ConceptInfo("rex", "dog", "cidm", ("rex-1", "rex-2"))
MIMI = ConceptInfo("mimi", "cat", "cidm", ("fluffy", "cat_3"))
INFOS = {"rex": REX, "mimi": MIMI}


@pytest.fixture
def vocabulary():
    return Vocabulary(INFOS.values())


def test_a_placeholder_becomes_the_words_of_its_concept(vocabulary):
    pieces = vocabulary.parse("a <rex> on grass").pieces
    assert pieces == ("a ", WordRef("rex", 0), WordRef("rex", 1), " on grass")


def test_a_word_can_stand_alone(vocabulary):
    assert vocabulary.parse("<cat_3>").pieces == (WordRef("mimi", 1),)


@pytest.mark.parametrize("prompt", ["", "a dog", "a < b > c", "3 <4", "<lora:rex:1>", "[]{}"])
def test_text_without_placeholders_stays_text(vocabulary, prompt):
    assert "".join(vocabulary.parse(prompt).pieces) == vocabulary.parse(prompt).text == prompt
    assert vocabulary.parse(prompt).concepts == () and vocabulary.knows(prompt)


def test_each_concept_is_named_once_in_order(vocabulary):
    assert vocabulary.parse("<fluffy> and <rex>, <mimi>, <rex-2>").concepts == ("mimi", "rex")


@pytest.mark.parametrize(("prompt", "hint"), [("<rexx>", "<rex>"), ("<zzzzzz>", "known: ")])
def test_an_unknown_placeholder_is_refused_with_a_hint(vocabulary, prompt, hint):
    with pytest.raises(ConceptError, match=hint):
        vocabulary.parse(prompt)
    assert not vocabulary.knows(prompt)


def test_a_parsed_prompt_is_a_value_and_is_not_parsed_again(vocabulary):
    prompt = vocabulary.parse("a <rex> and <fluffy>")
    assert vocabulary.parse(prompt) is prompt and NO_CONCEPTS.parse(prompt) is prompt
    assert prompt == vocabulary.parse(prompt.text) and len({prompt, vocabulary.parse(prompt.text)}) == 1
    assert prompt != vocabulary.parse("a <rex> and <mimi>")


def test_placeholders_can_be_substituted(vocabulary):
    prompt = vocabulary.parse("a <rex> and <fluffy>, (<rex>:1.2)")
    assert prompt.placeholders == ("rex", "fluffy", "rex")
    assert len(prompt.placeholder_weights) == 3
    assert prompt.substituted(str.upper) == "a REX and FLUFFY, (REX:1.2)"
    for text in ("a (red:1.3) photo of REX", "(big:1.2)(red:1.3) REX"):      # plain text stays plain
        assert vocabulary.parse(text.replace("REX", "<rex>")).substituted(str.upper) == text


@pytest.mark.parametrize(("scene", "expected"), [
    ("a dog", {}),
    ("<rex> at night", {"rex": "<rex-1><rex-2> at night"}),
    ("a photo of <rex> and <mimi> in a room", {"rex": "a photo of <rex-1><rex-2> and cat in a room",
                                               "mimi": "a photo of dog and <fluffy><cat_3> in a room"}),
    ("<rex> <mimi> and <rex-1>",
     {"rex": "<rex-1><rex-2> cat and <rex-1>", "mimi": "dog <fluffy><cat_3> and dog"}),
    ("<fluffy> <cat_3>  with <rex-2>", {"mimi": "<fluffy> <cat_3>  with dog", "rex": "cat   with <rex-2>"}),
])
def test_prompts_with_one_concept_and_the_class_nouns_of_the_others(vocabulary, scene, expected):
    apart = vocabulary.parse(scene).apart(INFOS)
    assert {name: prompt.text for name, prompt in apart.items()} == expected
    # parsing its text gives the same value
    assert all(vocabulary.parse(prompt.text) == prompt for prompt in apart.values())


def test_all_words_of_concepts_as_a_prompt(vocabulary):
    assert words_prompt([REX, MIMI]) == vocabulary.parse("<rex> <mimi>") and words_prompt([]).pieces == ()


def test_an_empty_bank_says_so():
    with pytest.raises(ConceptError, match="no bank was given, or it holds no concept"):
        Vocabulary([]).parse("<rex>")


@pytest.mark.parametrize("other",
                         [ConceptInfo("rex-1", "dog", "cidm", ("a", "b")),
                          ConceptInfo("b", "dog", "cidm", ("rex", "c"))])
def test_two_concepts_cannot_claim_one_placeholder(other):
    with pytest.raises(ConceptError, match="rename one"):
        Vocabulary([REX, other])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a photo of <rex> on a beach", "a photo of dog on a beach"),
        ("<rex> and <mimi>", "dog and cat"),
        ("<rex-1> <rex-2>  runs", "dog runs"),
        ("<rex> beside <rex>", "dog beside dog"),
        ("a  plain\nprompt ", "a plain prompt"),
    ],
)
def test_plain_text_has_class_nouns(vocabulary, prompt, expected):
    assert vocabulary.parse(prompt).plain(INFOS) == expected


@pytest.mark.parametrize(
    ("caption", "noun", "expected"),
    [
        ("", "dog", "a photo of <rex>"),
        ("a Dog and a dog", "dog", "a <rex> and a dog"),
        ("a hotdog", "dog", "<rex>, a hotdog"),
        ("on grass", "", "<rex>, on grass"),
        ("a <rex-1> runs", "dog", "a <rex-1> runs"),
        ("a (small) dog.", "(small) dog", "<rex>, a (small) dog."),
    ],
)
def test_captions_name_the_concept(caption, noun, expected):
    assert caption_with_placeholder(caption, "rex", noun) == expected


@pytest.mark.parametrize("room", ["model", "attention", "conditioning", "regional"])
def test_nothing_below_the_edges_parses_text(room):
    """Samplers, nodes and learning parse; what they call takes a `Prompt`."""
    core = Path(prompts.__file__).parents[1]
    for file in sorted((core / room).glob("*.py")):
        source = file.read_text(encoding="utf-8")
        assert not re.search(r"\bVocabulary\b|\bPLACEHOLDER\b|\bparse(_all)?\(", source), file.name


@pytest.mark.parametrize(("typed", "expected"), [
    ("a (red) ((big)) dog", "a (red) ((big)) dog"),
    ("(<rex>:0.8) and <rex:0.5>", "dog and dog"),
    ("((<rex>)) in ( <rex> : 1.2 )", "dog in dog"),
    ("(a <rex>:1.2) \\(<rex>\\)", "(a dog:1.2) \\(dog\\)"),
    ("\\<rex\\> and <other thing>", "<rex> and <other thing>"),
])
def test_a_prompt_as_typed_keeps_parentheses_that_are_not_a_concepts_own(typed, expected):
    vocabulary = Vocabulary([ConceptInfo("rex", "dog", "slots", ("rex-1",))])
    assert vocabulary.literal(vocabulary.parse(typed), lambda name: "dog") == expected

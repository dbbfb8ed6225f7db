"""Token groups: names, starting vectors and checks against a base; concepts as records."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from continual_concepts.core.bank.concepts import ConceptInfo
from continual_concepts.core.bank.tokens import (
    MAX_WORDS,
    TokenGroup,
    check_class_noun,
    check_name,
    initial_vectors,
    typed_name,
)
from continual_concepts.core.errors import ConceptError


@pytest.mark.parametrize("name", ["rex", "a", "dog_2", "my-dog", "собака", "犬", "7up", "x" * 64])
def test_good_names(name):
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "-rex", "rex_", "a b", "a/b", "..", "a\n", "<rex>", "x" * 65, None, 3])
def test_bad_names_are_refused(name):
    with pytest.raises(ConceptError, match="not allowed"):
        check_name(name)


@pytest.mark.parametrize("words", [(), ("a", "a"), ("a b",), tuple(f"w{i}" for i in range(MAX_WORDS + 1))])
def test_words_must_be_few_and_different(words):
    with pytest.raises(ConceptError):
        ConceptInfo("rex", "dog", "cidm", words)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("words", [1, 2, 3, 5])
@pytest.mark.parametrize("noun_length", [1, 2, 3])
def test_the_start_is_one_random_word_and_the_class_noun(words, noun_length):
    noun = torch.randn(noun_length, 6, generator=generator(1))
    start = initial_vectors(noun, words, 4, 0.5, generator())
    assert start.shape == (4, words, 6)
    assert torch.equal(start, start[:1].expand_as(start))
    for position in range(1, words):      # the noun's last vectors in order, the very last one repeated
        assert torch.equal(start[0, position],
                           noun[min(noun_length - 1, max(0, noun_length - (words - 1)) + position - 1)])
    assert not (noun == start[0, 0]).all(1).any()


def test_the_first_word_has_the_asked_spread():
    start = initial_vectors(torch.zeros(0, 4000), 1, 1, 0.25, generator())
    assert start.std() == pytest.approx(0.25, rel=0.05)


def test_the_mean_copy_has_one_layer(layout, make_concept):
    tokens = make_concept(layout).tokens
    single = tokens.mean_copy()
    assert single.copies == 1
    assert torch.allclose(single.word(1, "clip_l")[0], tokens.word(1, "clip_l").mean(0))
    single.check_fits(layout, "it")


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({"clip_l": torch.zeros(3, 2, 3)}, "'clip_g'"),
        ({"clip_l": torch.zeros(3, 2, 3), "clip_g": torch.zeros(3, 2, 3)}, "shape"),
        ({"clip_l": torch.zeros(2, 2, 3), "clip_g": torch.zeros(3, 2, 2)}, "shape"),
        ({"clip_l": torch.zeros(3, 1, 3), "clip_g": torch.zeros(3, 2, 2)}, "shape"),
        ({"clip_l": torch.zeros(2, 3), "clip_g": torch.zeros(3, 2, 2)}, "shape"),
    ],
)
def test_vectors_of_another_base_are_refused(layout, vectors, message):
    with pytest.raises(ConceptError, match=message):
        TokenGroup(("a", "b"), vectors).check_fits(layout, "it")


def test_a_concept_needs_vectors_for_its_own_words(layout, make_concept):
    concept = make_concept(layout)
    other = replace(concept, tokens=TokenGroup(("x", "y"), concept.tokens.vectors))
    with pytest.raises(ConceptError, match="words"):
        other.check_fits(layout)


def test_a_name_may_be_typed_as_a_placeholder_and_with_separate_accents():
    assert typed_name(" <rex> ") == "rex"
    assert check_name(typed_name("<Jose\u0301>")) == "Jos\u00e9"


def test_renaming_renames_the_words_that_bear_the_name(layout, make_concept):
    concept = make_concept(layout, "a")
    words = ("a-1", "apple")
    concept = replace(concept, info=replace(concept.info, words=words),
                      tokens=TokenGroup(words, concept.tokens.vectors))
    renamed = concept.renamed("zed")
    assert renamed.info.words == renamed.tokens.words == ("zed-1", "apple")
    assert renamed.info.placeholder == "<zed>"


@pytest.mark.parametrize("sign", ["\x1b", "\x00", "\u202e", "\u2066", "<"])
def test_a_class_noun_is_a_plain_word(sign):
    assert check_class_noun(" teddy \n bear ") == "teddy bear" and check_class_noun("سگ\u200cها")
    with pytest.raises(ConceptError, match="is not allowed, because it holds"):
        check_class_noun(f"do{sign}g")

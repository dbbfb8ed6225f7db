"""Placeholder nouns: which token id takes the place of which word, and what is put together afterwards."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.bank.prompts import WordRef
from continual_concepts.core.bank.tokens import TokenGroup
from continual_concepts.core.conditioning.placeholder_nouns import (
    encoded_apart,
    noun_for,
    noun_ids,
    placeholder_noun_ids,
    positions_of,
    with_words,
)

REX = (WordRef("rex", 0), WordRef("rex", 1))
MIMI = (WordRef("mimi", 0),)
ROW = [None, REX[0], REX[1], None, MIMI[0], None, REX[1]]


class Letters:
    """A tokenizer with one token for each letter."""

    pad = 0

    @staticmethod
    def ids(text):
        return [ord(letter) for letter in text.replace(" ", "")]


@pytest.mark.parametrize(("noun", "count", "expected"), [
    ("dog", 1, "g"), ("dog", 3, "dog"), ("dog", 4, "adog"), ("dog", 6, "aaadog"), ("", 2, "aa"),
])
def test_every_word_has_an_id_of_the_noun(noun, count, expected):
    assert placeholder_noun_ids(Letters, noun, count) == [ord(letter) for letter in expected]


def test_a_text_without_tokens_gives_padding():
    class Empty(Letters):
        @staticmethod
        def ids(text):
            return []

    assert placeholder_noun_ids(Empty, "", 3) == [0, 0, 0]


@pytest.fixture
def nouns():
    def group(words, noun):
        return TokenGroup(tuple(f"w{i}" for i in range(words)), {"clip_l": torch.zeros(1, words, 4)}, noun)

    return noun_ids(Letters, {"rex": group(2, "dog"), "mimi": group(1, "")})


def test_concepts_without_a_noun_have_no_ids(nouns):
    assert nouns == {REX[0]: ord("o"), REX[1]: ord("g")}
    assert encoded_apart(ROW, nouns) == ["rex"] and encoded_apart([None, *MIMI], nouns) == []


def test_a_noun_takes_the_place_of_words_but_for_one_concept(nouns):
    assert [noun_for(word, nouns) for word in ROW] == [None, ord("o"), ord("g"), None, None, None, ord("g")]
    assert not any(noun_for(word, nouns, but="rex") for word in ROW)


def test_positions_of_each_concept():
    assert positions_of(ROW) == {"rex": (1, 2, 6), "mimi": (4,)} and positions_of([None]) == {}


@pytest.mark.parametrize("copies", [1, 3])
def test_words_replace_the_states_at_their_positions_alone(copies):
    """States of one copy and of several broadcast with the words' own copies."""
    rest, own = torch.zeros(copies, 7, 2), torch.arange(1.0, 4).view(3, 1, 1).expand(3, 7, 2)
    states = with_words(rest, own, (1, 2, 6))
    assert states.shape == (3, 7, 2)
    assert torch.equal(states[:, [1, 2, 6]], own[:, [1, 2, 6]]) and not states[:, [0, 3, 4, 5]].any()

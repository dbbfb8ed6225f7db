"""Warnings about captions as a whole."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.bank.concepts import ConceptInfo
from continual_concepts.core.data.caption_lint import caption_warnings, common_phrases
from continual_concepts.core.data.pictures import Picture
from continual_concepts.core.data.training_set import check_captions

REX = ConceptInfo("rex", "dog", "slots", ("rex_1", "rex_2"), "object")


def pictures(*captions):
    return [Picture(torch.zeros(3, 8, 8), caption) for caption in captions]


def texts(*captions, concept=REX):
    return [warning.text for warning in caption_warnings(pictures(*captions), concept)]


def test_the_captions_of_a_benchmark():
    """Those of the first concept of CIFC say the same of the tongue."""
    captions = ("dog sticking its tongue out", "dog standing on a wall with its tongue out",
                "dog sitting on a ledge with a cherry tree in the background",
                "dog sitting on a ledge with its tongue out",
                "dog standing on a sidewalk with its tongue out")
    (text,) = texts(*captions)
    assert "'tongue out' (4 of 5)" in text and "ledge" not in text and "vary them" in text


def test_a_part_of_a_longer_phrase_is_named_only_if_it_stands_in_more_captions():
    captions = ("<rex> with a red scarf", "<rex> in a red scarf at night",
                "a red car and <rex> in a red scarf")
    assert common_phrases(captions) == {"red scarf": 3}
    assert common_phrases((*captions, "<rex> beside a red car")) == {"red": 4, "red scarf": 3}


def test_phrases_end_at_placeholders_and_punctuation():
    assert common_phrases(("yellow <duck> swims", "yellow, <duck> swims", "a yellow <duck>, swims")) == {
        "swims": 3, "yellow": 3}


@pytest.mark.parametrize("captions", [
    ("a photo of <rex> on a beach", "a photo of <rex> in a forest", "a photo of <rex> at night"),
    ("a photo of a dog on grass", "a photo of a dog on sand", "a photo of a dog"),
    ("<rex> on grass", "<rex> on grass"),      # two tell nothing
    ("a view of the {} on grass",) * 4,      # templates
    ("", "", ""), (),
])
def test_ordinary_captions_get_no_warning(captions):
    assert texts(*captions) == []


def test_captions_without_the_subject():
    (text,) = texts("a puppy on grass", "a puppy at night", "puppy")[1:]
    assert "no caption names the subject as 'dog' or <rex>" in text
    (text,) = texts("dog, at night", "a hound on sand")
    assert text.startswith("caption 2 does not name") and "<rex> goes in front" in text
    no_noun = ConceptInfo("rex", "", "slots", ("rex_1",), "object")
    assert texts("a hound on sand", concept=no_noun) == []


def test_prior_pictures_and_photos_alone_are_checked():
    captions = pictures("a dog in a red scarf", "a dog with red scarf", "red scarf of a dog")
    assert [warning.kind for warning in check_captions(captions, [REX], REX)] == ["caption"]
    assert check_captions(captions, [REX]) == []

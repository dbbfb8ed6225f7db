"""Textual inversion: nothing but words, which begin as the class noun."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import Task, make
from continual_concepts.core.sampling.sampling import sample
from continual_concepts.core.sampling.settings import SampleSettings

QUICK = SampleSettings(steps=2, cfg=2.0, size=(32, 32))


def begun(backbone, settings=None, noun="dog", words=()):
    method = make("textual_inversion", {"stored": "float32"} | (settings or {}))
    method.begin(Task("rex", noun, backbone, ConceptBank(backbone.layout), words=words))
    return method


def noun_vectors(backbone, noun="dog"):
    return backbone.text[0].vectors(backbone.text[0].ids(noun))


def test_the_word_starts_as_the_class_noun(slim_backbone):
    vectors = begun(slim_backbone, words=("rex",)).token_group().vectors["clip_l"]
    assert vectors.shape == (1, 1, 32) and torch.equal(vectors[0, 0], noun_vectors(slim_backbone)[-1])


def test_several_words_start_as_the_noun_s_last_ones(slim_backbone):
    known = noun_vectors(slim_backbone, "duck toy")
    assert len(known) > 1
    two = begun(slim_backbone, noun="duck toy").token_group().vectors["clip_l"]
    assert torch.equal(two[0], known[-2:])
    many = begun(slim_backbone, noun="dog", words=("a1", "a2", "a3")).token_group().vectors["clip_l"]
    assert torch.equal(many[0], noun_vectors(slim_backbone)[-1:].expand(3, -1))


def test_a_random_start_is_not_the_noun(slim_backbone):
    vectors = begun(slim_backbone, {"start": "random"}).token_group().vectors["clip_l"]
    assert not torch.allclose(vectors[0, 0], noun_vectors(slim_backbone)[-1], atol=1e-3)
    assert torch.equal(vectors[0, 1], noun_vectors(slim_backbone)[-1])


def test_layers_have_their_own_words_only_when_asked(slim_backbone, teach):
    def learned(settings):
        found = teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", "textual_inversion", settings)
        return found.concept.tokens.vectors["clip_l"]

    assert learned({}).shape[0] == 1
    own = learned({"layerwise": True})
    assert own.shape[0] == slim_backbone.layout.copies and not torch.equal(own[0], own[1])


def test_nothing_but_the_words_trains(slim_backbone, teach):
    groups = begun(slim_backbone, words=("rex",)).parameter_groups()
    assert [sum(p.numel() for p in group["params"]) for group in groups] == [32]
    one, other = (teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", "textual_inversion",
                        {"lr": lr}) for lr in (0.0, 1.0))
    assert one.concept.deltas == {} and one.bank.shared == {}
    assert torch.equal(one.concept.tokens.vectors["clip_l"], other.concept.tokens.vectors["clip_l"])
    assert not torch.equal(one.concept.tokens.vectors["clip_l"][0, 0], noun_vectors(slim_backbone)[-1])


def test_later_concepts_change_no_picture_of_earlier_ones(slim_backbone, teach):
    first = teach(slim_backbone, ConceptBank(slim_backbone.layout), "rex", "textual_inversion").bank
    second = teach(slim_backbone, first, "mimi", "textual_inversion", noun="cat").bank
    for prompt in ("a <rex>", "a dog"):
        before, after = (sample(slim_backbone, bank, [prompt], [1], QUICK) for bank in (first, second))
        assert torch.equal(before, after)


def test_it_learns_on_two_text_encoders(tiny_sdxl, teach):
    concept = teach(tiny_sdxl, ConceptBank(tiny_sdxl.layout), "rex", "textual_inversion", steps=2).concept
    assert set(concept.tokens.vectors) == {"clip_l", "clip_g"}
    assert all(v.shape[0] == 1 for v in concept.tokens.vectors.values())


@pytest.mark.parametrize("settings", [{"start": "cat"}, {"lr": -1.0}, {"token_lr": -1.0}])
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(ConceptError, match=f"'{next(iter(settings))}'"):
        make("textual_inversion", settings)

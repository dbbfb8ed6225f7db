"""Prompts for text encoders that take no learned vectors."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.bank.concepts import ConceptInfo
from continual_concepts.core.bank.prompts import Vocabulary
from continual_concepts.core.bank.tokens import TokenGroup
from continual_concepts.core.conditioning.encoding import TextMemory, encode_prompts
from continual_concepts.core.errors import ConceptError
from continual_concepts.core.methods import METHODS, Task, make
from continual_concepts.core.methods.check_base import check_base
from continual_concepts.core.model.backbone import WholePromptEncoder
from continual_concepts.core.model.sites import transformer_layout

WIDTH = 4
LAYOUT = transformer_layout({f"blocks.{i}.cross_attn": (2, 8, WIDTH) for i in range(2)}, (("t5xxl", WIDTH),))
INFOS = [ConceptInfo("rex", "dog", "slots", ("rex-1", "rex-2", "rex-3")),
         ConceptInfo("ink", "old painting", "lora", ("ink-1", "ink-2"))]
GROUPS = {info.name: TokenGroup(info.words, {"t5xxl": torch.zeros(1, len(info.words), WIDTH)},
                                info.class_noun) for info in INFOS}


class Letters(WholePromptEncoder):
    """One row per word; the state is the word's length, times its weight."""

    name, width, length, start, end, pad = "t5xxl", WIDTH, 100, 0, 0, 0

    def __init__(self) -> None:
        self.read: list[str] = []

    def ids(self, text):
        return [len(word) for word in text.split()]

    def vectors(self, ids):
        return torch.tensor(ids).float().unsqueeze(1).expand(-1, WIDTH)

    def encode_pieces(self, pieces):
        self.read.append("".join(piece.text for piece in pieces))
        rows, mentions = [], []
        for piece in pieces:
            words = piece.text.split()
            if piece.concept:
                mentions.append(tuple(range(len(rows), len(rows) + len(words))))
            rows += [piece.weight * len(word) for word in words]
        states = torch.tensor(rows or [0.0]).view(1, -1, 1).expand(-1, -1, WIDTH)
        return states, tuple(mentions)


@pytest.fixture
def backbone():
    return SimpleNamespace(text=(Letters(),), layout=LAYOUT, device="cpu")


def encoded(backbone, *texts, **more):
    return encode_prompts(backbone, Vocabulary(INFOS).parse_all(texts), GROUPS, **more)


def test_concepts_are_class_nouns_for_each_of_their_words(backbone):
    context = encoded(backbone, "a <rex> of <ink>", "my <rex-2>")
    assert backbone.text[0].read == ["a dog dog dog of old painting old painting", "my dog"]
    assert context.words == ({"rex": (1, 2, 3), "ink": (5, 6, 7, 8)}, {"rex": (1,)})
    assert context.hidden.shape == (2, 1, 9, WIDTH) and (context.hidden[1, 0, 2:] == 0).all()


def test_a_weight_is_a_factor_on_deltas_or_on_states(backbone):
    context = encoded(backbone, "(big:2.0) (<rex>:0.5) (<ink>:0.5)", by_strength={"rex"})
    assert context.hidden[0, 0, :, 0].tolist() == [6, 3, 3, 3, 1.5, 4, 1.5, 4]
    assert context.strengths == ({"rex": (0.5, 0.5, 0.5)},)


def test_each_place_where_a_concept_is_named_has_its_own_strength(backbone):
    context = encoded(backbone, "(<rex>:0.5) and <rex>", "<rex-1> (<rex-3>:2.0)", by_strength={"rex"})
    assert context.words == ({"rex": (0, 1, 2, 4, 5, 6)}, {"rex": (0, 1)})
    assert context.strengths == ({"rex": (0.5, 0.5, 0.5, 1.0, 1.0, 1.0)}, {"rex": (1.0, 2.0)})
    assert len(set(backbone.text[0].read)) == 2 and (context.hidden[0, 0, :3] == 3).all()


def test_a_prompt_is_encoded_once(backbone):
    memory = TextMemory()
    for _ in range(3):
        encoded(backbone, "a <rex>", "", memory=memory)
    assert backbone.text[0].read == ["a dog dog dog", ""]


def test_a_concept_without_a_class_noun_is_refused(backbone):
    groups = {"rex": replace(GROUPS["rex"], placeholder_noun="")}
    with pytest.raises(ConceptError, match="concept 'rex' has no class noun"):
        encode_prompts(backbone, Vocabulary(INFOS).parse_all(["<rex>"]), groups)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_that_learn_words_are_refused(backbone, name):
    task = Task("rex", "dog", backbone, ConceptBank(LAYOUT))
    if name in ("slots", "lora"):
        check_base(make(name), task)
        with pytest.raises(ConceptError, match="class noun of concept 'rex' is empty"):
            check_base(make(name), replace(task, class_noun=" "))
    else:
        with pytest.raises(ConceptError, match=f"method '{name}' learns words.*this model: lora, slots"):
            check_base(make(name), task)


def test_learned_words_of_slots_are_refused(backbone):
    with pytest.raises(ConceptError, match="'learn_words' is True.*allowed: False"):
        check_base(make("slots", {"learn_words": True}), Task("rex", "dog", backbone, ConceptBank(LAYOUT)))


@pytest.mark.parametrize("name, kind", [("slots", "object"), ("slots", "style"), ("lora", "object")])
def test_the_words_are_the_noun_and_are_not_trained(backbone, name, kind):
    task = Task("rex", "dog", backbone, ConceptBank(LAYOUT), kind).worded(2)
    method = make(name)
    method.begin(task)
    assert len(method.parameter_groups()) == 1
    group = method.finish().tokens
    assert group.placeholder_noun == "dog" and (group.vectors["t5xxl"] == 3).all()

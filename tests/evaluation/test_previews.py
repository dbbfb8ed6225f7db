"""Previews while a concept is learned: from the same seeds, scored against photos, and the last one as its
thumbnail."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from continual_concepts.core.bank.bank import ConceptBank
from continual_concepts.core.data.framing import Framing, Picture
from continual_concepts.core.data.training_set import prepare
from continual_concepts.core.evaluation.previews import (
    OLDER,
    SCORED,
    Previews,
    concept_prompt,
    learn_with_previews,
    older_concepts,
    similarity_to,
)
from continual_concepts.core.images import thumbnail_of
from continual_concepts.core.methods import Task, make
from continual_concepts.core.sampling.settings import SampleSettings
from continual_concepts.core.training.config import TrainingConfig

QUICK = SampleSettings(steps=1, size=(32, 32))


@pytest.fixture
def learn(slim_backbone, tmp_path):
    """learn(previews, last, ...): bank and losses; other keywords are TrainingConfig's."""
    def run(previews, last=True, **training):
        task = Task("rex", "dog", slim_backbone, ConceptBank(slim_backbone.layout))
        config = TrainingConfig(**{"steps": 6, "resolution": 32} | training)
        pictures = [Picture(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1)]
        data = prepare(slim_backbone, pictures, "rex", "dog", Framing(32))
        method = make("bound", {"lr": 1e-2, "token_lr": 1e-2})
        learned = learn_with_previews(task, method, data, config, previews, lambda info: None,
                                      tmp_path / "run", last)
        return learned.bank, learned.losses

    return run


def test_the_last_preview_is_the_thumbnail(slim_backbone, learn):
    previews = Previews(slim_backbone, concept_prompt("rex", "object"), QUICK, 3)
    bank, losses = learn(previews)
    assert len(losses) == 6 and previews.last_step == 6 and len(previews.pictures) == 1
    assert not previews.scores
    assert bank["rex"].thumbnail == thumbnail_of(previews.pictures[0])
    assert Image.open(io.BytesIO(bank["rex"].thumbnail)).size == (32, 32)
    without, same_losses = learn(Previews(slim_backbone, "<rex>", QUICK, 3), last=False)
    assert without["rex"].thumbnail == b"" and same_losses == losses


def test_learning_stops_when_the_similarity_no_longer_grows(slim_backbone, learn):
    scores = iter([0.1, 0.5, 0.4, 0.5])
    previews = Previews(slim_backbone, "a photo of <rex>", QUICK, 3, lambda pictures: next(scores))
    _, losses = learn(previews, steps=20, patience=2, look_every=2)
    assert len(losses) == 8 and previews.scores == [(2, 0.1), (4, 0.5), (6, 0.4), (8, 0.5)]
    assert len(previews.pictures) == 4      # the one that ended learning is not drawn again


def test_a_preview_that_is_scored_has_several_pictures(slim_backbone):
    shown = []
    previews = Previews(slim_backbone, "a dog", QUICK, 3, lambda pictures: shown.append(len(pictures)) or 0.5)
    assert previews.evaluate(ConceptBank(slim_backbone.layout), 7) == 0.5
    assert shown == [SCORED] and len(previews.pictures) == 1 and previews.last_step == 7


def test_similarity_is_image_alignment():
    photos = [torch.ones(3, 2, 2), -torch.ones(3, 2, 2)]
    similarity = similarity_to(photos, lambda pictures: torch.stack([p.mean().repeat(1) for p in pictures]))
    assert similarity(torch.ones(4, 3, 2, 2)) == 0 and similarity(photos[:1]) == 0
    alone = similarity_to(photos[:1], lambda pictures: torch.stack([p.mean().repeat(1) for p in pictures]))
    assert alone(photos) == 0 and alone(photos[:1]) == 1 and alone(photos[1:]) == -1


def test_older_concepts_are_spread_and_each_follows_its_thumbnail(slim_backbone, make_concept):
    bank, calls = ConceptBank(slim_backbone.layout), []
    for i in range(OLDER + 3):
        bank = bank.add(make_concept(slim_backbone.layout, f"c{i}", i, thumbnail=bytes([i])))
    rows = older_concepts(slim_backbone, bank, bank.names, QUICK, 0, lambda: calls.append(1))
    assert len(rows) == 2 * OLDER == 2 * len(calls)
    assert rows[0] == ("<c0> when learned", b"\0") and rows[1][0] == "<c0> now"
    assert rows[-1][0] == f"<c{OLDER + 2}> now"
    assert all(Image.open(io.BytesIO(picture)).size == (32, 32) for _, picture in rows[1::2])

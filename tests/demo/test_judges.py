"""The shipped metric encoder and classifier still judge pictures that their training never saw."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from continual_concepts.core import demo
from continual_concepts.core.demo import scenes, vocabulary
from continual_concepts.core.demo.classifier import QualityClassifier
from continual_concepts.core.demo.encoder import MetricEncoder

ASSETS = Path(demo.__file__).parent / "assets"
OBJECTS = [name for name, concept in scenes.CONCEPTS.items() if concept.kind == "object"]
STYLES = [name for name, concept in scenes.CONCEPTS.items() if concept.kind == "style"]


def stacked(pictures) -> torch.Tensor:
    """uint8 pictures to `[B, 3, 64, 64]` in -1..1."""
    return torch.from_numpy(np.stack(list(pictures))).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def ranking_accuracy(positives: torch.Tensor, negatives: torch.Tensor) -> float:
    """Area under the ROC curve: how often a positive exceeds a negative, ties counted half."""
    ordered = negatives.flatten().sort().values
    below, upto = (torch.searchsorted(ordered, positives.flatten(), right=right).double()
                   for right in (False, True))
    return float((below + upto).mean() / 2 / len(ordered))


@pytest.fixture(scope="module")
def encoder() -> MetricEncoder:
    return MetricEncoder.load(ASSETS / "metrics.safetensors")


@pytest.fixture(scope="module")
def classifier() -> QualityClassifier:
    return QualityClassifier.load(ASSETS / "classifier.safetensors")


def test_sizes_fit_the_budget(encoder, classifier):
    assert sum(p.numel() for p in encoder.parameters()) <= 230_000
    assert sum(p.numel() for p in classifier.parameters()) <= 60_000


@pytest.mark.parametrize("unseen", [False, True])
def test_classifier_names_kind_and_colour(classifier, unseen):
    rng, things = random.Random(20_001 + unseen), []
    while len(things) < 100:
        thing = scenes.random_thing(rng, unseen=unseen)
        if "body" in thing.names:
            things.append(thing)
    images = stacked(scenes.render(scenes.random_scene(rng, (thing,), "photo")) for thing in things)
    named = classifier.name(images)
    assert np.mean([kind == thing.kind for (kind, _), thing in zip(named, things, strict=True)]) >= 0.98
    assert np.mean([colour == thing.names["body"] for (_, colour),
                    thing in zip(named, things, strict=True)]) >= 0.98


def concept_ranking(features, concept: scenes.SceneConcept) -> float:
    """Whether the concept's pictures lie nearer to other pictures of it than distractors do."""
    rng = random.Random(20_003)
    known = features(stacked(picture for picture, _ in concept.pictures(12, 20_004)))
    again = features(stacked(picture for picture, _ in concept.pictures(12, 20_005)))
    others = features(stacked(scenes.render(concept.distractor(rng)) for _ in range(24)))
    return ranking_accuracy(known @ again.T, known @ others.T)


@pytest.mark.parametrize("name", OBJECTS)
def test_object_features_tell_the_individual(encoder, name):
    assert concept_ranking(encoder.object_features, scenes.CONCEPTS[name]) >= 0.95


@pytest.mark.parametrize("name", STYLES)
def test_style_features_tell_the_style(encoder, name):
    assert concept_ranking(encoder.style_features, scenes.CONCEPTS[name]) >= 0.95


def test_a_picture_prefers_its_own_caption(encoder):
    rng = random.Random(20_006)
    drawn = [scenes.random_scene(rng) for _ in range(100)]
    captions = [scenes.caption(scene, rng, detail=0.8) for scene in drawn]
    tokenizer = vocabulary.load(ASSETS / "tokenizer")
    ids = torch.tensor(tokenizer(captions, padding="max_length", truncation=True, max_length=77).input_ids)
    cosines = encoder.image_text_features(stacked(map(scenes.render, drawn))) @ encoder.text_features(ids).T
    own, other = cosines.diagonal(), cosines[torch.arange(100),
                                             (torch.arange(100) + rng.randrange(1, 100)) % 100]
    assert (own > other).float().mean() >= 0.95


def test_features_have_unit_length_and_survive_storage(encoder, tmp_path):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoder.save(tmp_path / "again.safetensors")
    again = MetricEncoder.load(tmp_path / "again.safetensors")
    for name in ("object_features", "style_features", "image_text_features"):
        features = getattr(encoder, name)(images)
        assert torch.allclose(features.norm(dim=1), torch.ones(3), atol=1e-5)
        assert torch.equal(features, getattr(again, name)(images))

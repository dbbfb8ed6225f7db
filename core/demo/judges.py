"""The metric encoder with the evaluation's interface, and drawn concepts as tasks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.assignment import Assignment
from ..data.pictures import Picture
from . import scenes, vocabulary
from .bases import ASSETS, TOKENIZER
from .classifier import QualityClassifier
from .encoder import MetricEncoder

PLACES = ("on a beach", "in a meadow", "in the snow", "at night", "in a room", "on a yellow background")
SUBJECTS = ("a dog", "a cat", "a duck toy", "a teddy bear", "a car", "a robot", "a fish", "a backpack")
SIDE = 64      # side of the metric encoder's pictures
HELD_OUT_PICTURES = 24
HELD_OUT_SEED = 90_000


def at_encoder_size(images: Tensor) -> Tensor:
    """Averages pictures `[B, 3, H, W]` of at least 64 pixels down to `[B, 3, SIDE, SIDE]`."""
    if images.shape[-2:] == (SIDE, SIDE):
        return images
    return F.interpolate(images.clamp(-1, 1), size=(SIDE, SIDE), mode="area")


class SceneEncoder:
    """Features of drawn scenes, see `evaluation.protocol.Encoder`; larger ones are averaged to 64×64."""

    reads_texts = True

    @cached_property
    def _encoder(self) -> MetricEncoder:
        return MetricEncoder.load(ASSETS / "metrics.safetensors")

    @cached_property
    def _tokenizer(self):
        return vocabulary.load(TOKENIZER)

    @torch.no_grad()
    def features(self, images: Tensor, kind: str) -> Tensor:
        encoder, images = self._encoder, at_encoder_size(images)
        return encoder.style_features(images) if kind == "style" else encoder.object_features(images)

    @torch.no_grad()
    def image_text_features(self, images: Tensor) -> Tensor:
        return self._encoder.image_text_features(at_encoder_size(images))

    @torch.no_grad()
    def caption_features(self, captions: Sequence[str]) -> Tensor:
        ids = self._tokenizer(list(captions), padding="max_length", truncation=True,
                              max_length=vocabulary.CONTEXT_LENGTH).input_ids
        return self._encoder.text_features(torch.tensor(ids))


def load_classifier() -> QualityClassifier:
    return QualityClassifier.load(ASSETS / "classifier.safetensors")


def to_tensor(pictures: Sequence[np.ndarray]) -> Tensor:
    """uint8 pictures `[H, W, 3]` to `[B, 3, H, W]` in -1..1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def assignment(name: str, pictures: int = 5, seed: int = 7, size: int = SIDE) -> Assignment:
    """A concept of `scenes.CONCEPTS` as a task, see `assignment_of`."""
    return assignment_of(scenes.CONCEPTS[name], pictures, seed, size)


def assignment_of(concept: scenes.SceneConcept, pictures: int = 5, seed: int = 7,
                  size: int = SIDE) -> Assignment:
    """A drawn concept as a task, with `pictures` training pictures, and held-out pictures from other seeds.

    All pictures are `size` pixels wide and high.
    """
    name = concept.name
    shown = concept.pictures(pictures, seed, size)
    images = to_tensor([picture for picture, _ in shown])
    training = tuple(Picture(image, caption) for image, (_, caption) in zip(images, shown, strict=True))
    drawn = concept.pictures(HELD_OUT_PICTURES, HELD_OUT_SEED, size)
    held_out = to_tensor([picture for picture, _ in drawn])
    if concept.kind == "object":
        prompts = tuple(f"a photo of <{name}> {place}" for place in PLACES)
        noun_prompts = tuple(f"a photo of a {concept.class_noun} {place}" for place in PLACES)
    else:
        prompts = tuple(f"<{name}> of {subject}" for subject in SUBJECTS)
        noun_prompts = tuple(f"a {concept.class_noun} of {subject}" for subject in SUBJECTS)
    return Assignment(name, concept.class_noun, concept.kind, training, images, held_out,
                      prompts, noun_prompts)


def held_out_prompts(count: int, seed: int) -> list[tuple[str, str, str]]:
    """Captions of combinations held out of pretraining: (caption, kind, body colour)."""
    rng = random.Random(seed)
    result: list[tuple[str, str, str]] = []
    while len(result) < count:
        thing = scenes.random_thing(rng, unseen=True)
        colour = thing.names.get("body")
        if colour is None:
            continue
        scene = scenes.random_scene(rng, (thing,), "photo")
        pattern = "" if thing.pattern == "plain" else f" {thing.pattern}"
        phrase = scenes.article(f"{colour}{pattern} {thing.kind}")
        result.append((f"a photo of {phrase} {scenes.background_phrase(scene)}", thing.kind, colour))
    return result

"""Quality of the embedded base and of its metric encoder."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...core.bank.bank import ConceptBank
from ...core.demo import scenes
from ...core.demo.base import load_base
from ...core.demo.judges import SceneEncoder, load_classifier, to_tensor
from ...core.evaluation import metrics
from ...core.sampling.sampling import sample
from ...core.sampling.settings import SampleSettings
from .progress import captions_followed

SETTINGS = SampleSettings(steps=20, cfg=4.0, batch=25)
REAL_PICTURES = 400


@torch.no_grad()
def classifier_accuracy(count: int = REAL_PICTURES, seed: int = 31_000) -> dict:
    """Accuracy of the classifier on unseen drawn scenes."""
    rng, things = random.Random(seed), []
    while len(things) < count:
        thing = scenes.random_thing(rng, unseen=len(things) % 2 == 1)
        if "body" in thing.names:
            things.append(thing)
    named = load_classifier().name(to_tensor([scenes.render(scenes.random_scene(rng, (thing,), "photo"))
                                              for thing in things]))
    return {
        "class": sum(k == t.kind for (k, _), t in zip(named, things, strict=True)) / count,
        "colour": sum(c == t.names["body"] for (_, c), t in zip(named, things, strict=True)) / count,
    }


@torch.no_grad()
def encoder_auc(pictures: int = 40, seed: int = 32_000) -> dict:
    """Area under the ROC curve per concept, for its pictures against distractors of its class."""
    encoder, result = SceneEncoder(), {}
    for name, concept in scenes.CONCEPTS.items():
        rng = random.Random(seed)
        pictures_of = encoder.features(to_tensor([p for p, _ in concept.pictures(pictures, seed)]),
                                       concept.kind)
        reference = encoder.features(to_tensor([p for p, _ in concept.pictures(pictures, seed + 1)]),
                                     concept.kind)
        others = encoder.features(to_tensor([scenes.render(concept.distractor(rng))
                                             for _ in range(pictures)]), concept.kind)
        result[name] = metrics.area_under_curve((pictures_of @ reference.T).flatten(),
                                                (others @ reference.T).flatten())
    return result


def base_quality(path: Path, pictures: int = 400) -> dict:
    """Shares of pictures with the right class, the right body colour, and both, for captions of unseen
    combinations.

    Args:
        path: Of a base file, which need not ship.
        pictures: How many are drawn, by the library's sampler.
    """
    backbone = load_base(path)
    settings = replace(SETTINGS, size=(backbone.picture_size,) * 2)
    bank = ConceptBank(backbone.layout)

    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        return sample(backbone, bank, prompts, seeds, settings)

    return {
        "pictures": pictures,
        "steps": settings.steps,
        "cfg": settings.cfg,
        "generated": captions_followed(draw, pictures),
        "classifier": classifier_accuracy(),
        "encoder_auc": encoder_auc(),
    }

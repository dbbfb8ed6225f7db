"""Quality of the embedded base and of its metric encoder."""

from __future__ import annotations

import random

import torch

from ...core.bank.bank import ConceptBank
from ...core.demo import scenes
from ...core.demo.base import load_base
from ...core.demo.bases import picture_size
from ...core.demo.judges import SceneEncoder, at_encoder_size, held_out_prompts, load_classifier, to_tensor
from ...core.evaluation import metrics
from ...core.sampling.sampling import sample
from ...core.sampling.settings import SampleSettings

SIDE = picture_size()
SETTINGS = SampleSettings(steps=20, cfg=4.0, size=(SIDE, SIDE), batch=25)
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


@torch.no_grad()
def base_quality(pictures: int = 400) -> dict:
    """Shares of pictures with the right class, the right body colour, and both, for captions of unseen
    combinations.
    """
    backbone = load_base()
    prompts = held_out_prompts(pictures, seed=33_000)
    images = sample(backbone, ConceptBank(backbone.layout), [text for text, _, _ in prompts],
                    list(range(pictures)), SETTINGS)
    named = load_classifier().name(at_encoder_size(images))
    kinds = [k == kind for (k, _), (_, kind, _) in zip(named, prompts, strict=True)]
    colours = [c == colour for (_, c), (_, _, colour) in zip(named, prompts, strict=True)]
    both = [a and b for a, b in zip(kinds, colours, strict=True)]
    return {
        "pictures": pictures,
        "steps": SETTINGS.steps,
        "cfg": SETTINGS.cfg,
        "generated": {"class": sum(kinds) / pictures, "colour": sum(colours) / pictures,
                      "both": sum(both) / pictures},
        "classifier": classifier_accuracy(),
        "encoder_auc": encoder_auc(),
    }

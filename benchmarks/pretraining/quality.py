"""`python -m continual_concepts.benchmarks base`: can the embedded base be learned on, and is its metric encoder sharp?"""

from __future__ import annotations

import random

import torch

from ...core.bank.bank import ConceptBank
from ...core.demo import scenes
from ...core.demo.base import load_base
from ...core.demo.judges import SceneEncoder, held_out_prompts, load_classifier, to_tensor
from ...core.evaluation import metrics
from ...core.sampling.sampling import sample
from ...core.sampling.settings import SampleSettings

SETTINGS = SampleSettings(steps=20, cfg=4.0, size=(64, 64), batch=25)
REAL_PICTURES = 400


@torch.no_grad()
def classifier_accuracy(count: int = REAL_PICTURES, seed: int = 31_000) -> dict:
    """Of the judge itself, on real renders that it never saw."""
    rng, things = random.Random(seed), []
    while len(things) < count:
        thing = scenes.random_thing(rng, unseen=len(things) % 2 == 1)
        if "body" in thing.names:
            things.append(thing)
    named = load_classifier().name(to_tensor([scenes.render(scenes.random_scene(rng, (thing,), "photo")) for thing in things]))
    return {
        "class": sum(k == t.kind for (k, _), t in zip(named, things, strict=True)) / count,
        "colour": sum(c == t.names["body"] for (_, c), t in zip(named, things, strict=True)) / count,
    }


@torch.no_grad()
def encoder_auc(pictures: int = 40, seed: int = 32_000) -> dict:
    """Per concept: do its own pictures look more like each other than same-class distractors do?"""
    encoder, result = SceneEncoder(), {}
    for name, concept in scenes.CONCEPTS.items():
        rng = random.Random(seed)
        own = encoder.features(to_tensor([p for p, _ in concept.pictures(pictures, seed)]), concept.kind)
        reference = encoder.features(to_tensor([p for p, _ in concept.pictures(pictures, seed + 1)]), concept.kind)
        others = encoder.features(to_tensor([scenes.render(concept.distractor(rng)) for _ in range(pictures)]), concept.kind)
        result[name] = metrics.area_under_curve((own @ reference.T).flatten(), (others @ reference.T).flatten())
    return result


@torch.no_grad()
def base_quality(pictures: int = 400) -> dict:
    """Share of generated pictures with the right class, the right body colour and both, for captions of combinations never trained on."""
    backbone = load_base()
    wishes = held_out_prompts(pictures, seed=33_000)
    images = sample(backbone, ConceptBank(backbone.layout), [text for text, _, _ in wishes], list(range(pictures)), SETTINGS)
    named = load_classifier().name(images)
    kinds = [k == kind for (k, _), (_, kind, _) in zip(named, wishes, strict=True)]
    colours = [c == colour for (_, c), (_, _, colour) in zip(named, wishes, strict=True)]
    both = [a and b for a, b in zip(kinds, colours, strict=True)]
    return {
        "pictures": pictures,
        "steps": SETTINGS.steps,
        "cfg": SETTINGS.cfg,
        "generated": {"class": sum(kinds) / pictures, "colour": sum(colours) / pictures, "both": sum(both) / pictures},
        "classifier": classifier_accuracy(),
        "encoder_auc": encoder_auc(),
    }

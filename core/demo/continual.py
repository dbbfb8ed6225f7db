"""The continual benchmark on the embedded base: its suite, and the settings that fit so small a base."""

from __future__ import annotations

from itertools import combinations

from ..bank import ConceptBank
from ..evaluation import metrics
from ..evaluation.continual import Suite
from ..hosts.backbone import Backbone
from ..sampling import SampleSettings, sample
from ..training.config import TrainingConfig
from .judges import PLACES, WorldEncoder, assignment_of
from .sequence import concepts

SETTINGS = SampleSettings(steps=16, cfg=3.0, size=(64, 64), batch=24)
SEEDS = tuple(range(100, 108))
GROUP_SEEDS = tuple(range(300, 306))
GROUPS = 6      # of two concepts; two of three come on top
RATES = {"lr": 2e-3, "token_lr": 2e-2}      # a base 200 times smaller than SD1.5 learns at higher rates
OWN_RATES: dict[str, dict] = {      # where others did clearly better on two tasks
    "custom_diffusion_merge": {"lr": 3e-3},
    "l2dm": {"lr": 4e-3, "replay": 4, "mu": 2.0, "generation_steps": 20, "cfg": 3.0},
}


def training(steps: int, seed: int) -> TrainingConfig:
    return TrainingConfig(steps=steps, batch_size=4, resolution=64, flip=True, schedule="cosine", warmup=20, seed=seed)


def settings_of(method: str) -> dict:
    return {**RATES, **OWN_RATES.get(method, {})}


def _spread_out(items: list, count: int) -> list:
    """`count` of the items, evenly from first to last."""
    count = min(count, len(items))
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def _groups(things: list) -> tuple[tuple, tuple]:
    """Groups of two and three of different classes, neighbours in the sequence, and pairs of one class."""
    neighbours = [(a.name, b.name) for a, b in zip(things, things[1:], strict=False) if a.class_noun != b.class_noun]
    triples = [(a.name, b.name, c.name) for a, b, c in zip(things, things[1:], things[2:], strict=False)
               if len({a.class_noun, b.class_noun, c.class_noun}) == 3]
    same = [(a.name, b.name) for a, b in combinations(things, 2) if a.class_noun == b.class_noun]
    return (*_spread_out(neighbours, GROUPS), *_spread_out(triples, 2)), tuple(_spread_out(same, 4))


def levels(backbone: Backbone, tasks, encoder, noun_seeds=SEEDS) -> tuple[dict, dict, dict]:
    """Per concept: IA and TA of the class noun's pictures from the untouched base, and IA of held-out real pictures."""
    bank, noun, text, real = ConceptBank(backbone.layout), {}, {}, {}
    for task in tasks:
        prompts = [task.noun_prompts[i % len(task.noun_prompts)] for i in range(len(noun_seeds))]
        images, own = sample(backbone, bank, prompts, noun_seeds, SETTINGS), encoder.features(task.references, task.kind)
        noun[task.name] = metrics.image_alignment(encoder.features(images, task.kind), own)
        text[task.name] = metrics.text_alignment(encoder.image_text_features(images), encoder.caption_features(prompts))
        real[task.name] = metrics.image_alignment(encoder.features(task.held_out, task.kind), own)
    return noun, text, real


def suite(backbone: Backbone, count: int) -> tuple[Suite, dict]:
    """The suite of a sequence's first `count` concepts, and what the untrained base and real pictures reach."""
    encoder = WorldEncoder()
    tasks = tuple(assignment_of(concept, seed=7 + i) for i, concept in enumerate(concepts(count)))
    noun, text, real = levels(backbone, tasks, encoder)
    groups, pairs = _groups([task for task in tasks if task.kind == "object"])
    unrelated = tuple(task.noun_prompts[i % len(task.noun_prompts)] for i, task in enumerate(tasks[:10]))
    weights = sum(parameter.numel() for parameter in backbone.unet.parameters())
    made = Suite(tasks, groups, pairs, tuple(f"a photo of {{}} {place}" for place in PLACES[:4]), unrelated, encoder, SETTINGS, SEEDS,
                 GROUP_SEEDS, {name: (noun[name] + real[name]) / 2 for name in noun}, weights)
    untrained = {"image_alignment": sum(noun.values()) / count, "text_alignment": sum(text.values()) / count,
                 "real_pictures": sum(real.values()) / count}
    return made, untrained

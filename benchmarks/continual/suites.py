"""What suites of all sequences have in common: which concepts are named together, what the untrained base and real pictures reach."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from ...core.bank.bank import ConceptBank
from ...core.data.assignment import Assignment
from ...core.evaluation import metrics
from ...core.evaluation.protocol import Encoder
from ...core.images import spread
from ...core.model.backbone import Backbone
from ...core.sampling.sampling import sample
from ...core.sampling.settings import SampleSettings

Names = tuple[tuple[str, ...], ...]
GROUPS, TRIPLES, PAIRS = 6, 2, 4      # of two concepts, of three, and of two of one class


def groups_and_pairs(tasks: Sequence[Assignment]) -> tuple[Names, Names]:
    """Of a sequence's objects: groups of two and three of different classes, neighbours in the sequence, and pairs of one class."""
    things = [task for task in tasks if task.kind == "object"]
    neighbours = [(a.name, b.name) for a, b in zip(things, things[1:], strict=False) if a.class_noun != b.class_noun]
    triples = [(a.name, b.name, c.name) for a, b, c in zip(things, things[1:], things[2:], strict=False)
               if len({a.class_noun, b.class_noun, c.class_noun}) == 3]
    same = [(a.name, b.name) for a, b in combinations(things, 2) if a.class_noun == b.class_noun]
    return (*spread(neighbours, GROUPS), *spread(triples, TRIPLES)), tuple(spread(same, PAIRS))


def unrelated_prompts(tasks: Sequence[Assignment]) -> tuple[str, ...]:
    """Prompts without concepts, one from each of the first ten tasks."""
    return tuple(task.noun_prompts[i % len(task.noun_prompts)] for i, task in enumerate(tasks[:10]))


def _real_alignment(features: Tensor, held_out: Tensor) -> float:
    """IA of real pictures: of those held out `[M, D]`, else of the references `[N, D]` with each other; 1 when there is only one."""
    if len(held_out):
        return metrics.image_alignment(held_out, features)
    others = ~torch.eye(len(features), dtype=torch.bool)
    return float((features @ features.T)[others].mean()) if len(features) > 1 else 1.0


def levels(backbone: Backbone, tasks: Sequence[Assignment], encoder: Encoder, settings: SampleSettings,
           seeds: Sequence[int]) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Per concept: IA and TA of the class noun's pictures from the untouched base, a picture a seed, and IA of real pictures."""
    bank, noun, text, real = ConceptBank(backbone.layout), {}, {}, {}
    for task in tasks:
        prompts = [task.noun_prompts[i % len(task.noun_prompts)] for i in range(len(seeds))]
        images, own = sample(backbone, bank, prompts, seeds, settings), encoder.features(task.references, task.kind)
        noun[task.name] = metrics.image_alignment(encoder.features(images, task.kind), own)
        text[task.name] = metrics.text_alignment(encoder.image_text_features(images), encoder.caption_features(prompts))
        held_out = encoder.features(task.held_out, task.kind) if len(task.held_out) else own[:0]
        real[task.name] = _real_alignment(own, held_out)
    return noun, text, real


def untrained(noun: dict[str, float], text: dict[str, float], real: dict[str, float]) -> dict[str, float]:
    """Means over concepts of what `levels` found."""
    names = {"image_alignment": noun, "text_alignment": text, "real_pictures": real}
    return {name: sum(values.values()) / len(values) for name, values in names.items()}


def halfway(noun: dict[str, float], real: dict[str, float]) -> dict[str, float]:
    """Concept -> IA halfway between its class noun's and real pictures: what counts as that individual."""
    return {name: (noun[name] + real[name]) / 2 for name in noun}

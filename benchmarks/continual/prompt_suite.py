"""Prompt suites: tasks, prompts and seeds of a sequence, and reference levels of its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
from ...core.training.config import TrainingConfig

Names = tuple[tuple[str, ...], ...]
Levels = tuple[dict[str, float], dict[str, float], dict[str, float]]
GROUPS, TRIPLES, PAIRS = 6, 2, 4      # groups of two concepts, of three; pairs of one class


@dataclass(frozen=True)
class PromptSuite:
    """Data shared by all runs of a benchmark.

    Attributes:
        tasks: Tasks in the sequence's original order.
        groups: Names of two or three concepts of different classes in one prompt.
        pairs: Names of two concepts of one class in one prompt.
        combined: Prompts with one `{}` for the list of names.
        unrelated: Prompts without concepts.
        encoder: Measures similarity.
        settings: Sampling settings.
        seeds, group_seeds, pair_seeds: Seeds of the pictures per concept, per group and per pair.
        levels: Concept -> image alignment halfway between pictures of its class noun and real pictures.
        unet_weights: Number of weights of the base's UNet.
        origin: Other factors that affect the figures (base, data, ...), as JSON values.
    """

    tasks: tuple[Assignment, ...]
    groups: Names
    pairs: Names
    combined: tuple[str, ...]
    unrelated: tuple[str, ...]
    encoder: Encoder
    settings: SampleSettings
    seeds: tuple[int, ...]
    group_seeds: tuple[int, ...]
    pair_seeds: tuple[int, ...]
    levels: Mapping[str, float]
    unet_weights: int
    origin: Mapping = field(default_factory=dict)

    def named(self, name: str) -> Assignment:
        return next(task for task in self.tasks if task.name == name)


@dataclass(frozen=True)
class Benchmark:
    """Inputs of the runs of one command.

    Attributes:
        backbone: The base.
        suite: Tasks, prompts and seeds.
        untrained: Levels of the untrained base and of real pictures.
        training: Seed -> configuration.
        settings_of: Method -> its settings.
    """

    backbone: Backbone
    suite: PromptSuite
    untrained: dict
    training: Callable[[int], TrainingConfig]
    settings_of: Callable[[str], Mapping]


def groups_and_pairs(tasks: Sequence[Assignment]) -> tuple[Names, Names]:
    """Groups of two or three neighbouring objects of different classes, and pairs of one class."""
    objects = [task for task in tasks if task.kind == "object"]
    neighbours = [(a.name, b.name) for a, b in zip(objects, objects[1:], strict=False)
                  if a.class_noun != b.class_noun]
    triples = [(a.name, b.name, c.name) for a, b, c in zip(objects, objects[1:], objects[2:], strict=False)
               if len({a.class_noun, b.class_noun, c.class_noun}) == 3]
    same = [(a.name, b.name) for a, b in combinations(objects, 2) if a.class_noun == b.class_noun]
    return (*spread(neighbours, GROUPS), *spread(triples, TRIPLES)), tuple(spread(same, PAIRS))


def unrelated_prompts(tasks: Sequence[Assignment]) -> tuple[str, ...]:
    """Prompts without concepts, one from each of the first ten tasks."""
    return tuple(task.noun_prompts[i % len(task.noun_prompts)] for i, task in enumerate(tasks[:10]))


def _real_alignment(features: Tensor, held_out: Tensor) -> float:
    """Image alignment of real pictures.

    Compares held-out pictures `[M, D]` with the references `[N, D]`. Without held-out pictures, the
    references are compared with one another. A single reference has alignment 1.
    """
    if len(held_out):
        return metrics.image_alignment(held_out, features)
    others = ~torch.eye(len(features), dtype=torch.bool)
    return float((features @ features.T)[others].mean()) if len(features) > 1 else 1.0


def levels(backbone: Backbone, tasks: Sequence[Assignment], encoder: Encoder, settings: SampleSettings,
           seeds: Sequence[int]) -> Levels:
    """Three levels per concept: image and text alignment of the untrained base with the class noun, and image
    alignment of real pictures.

    Args:
        backbone: The untrained base.
        tasks: The concepts.
        encoder: Measures similarity.
        settings: Sampling settings.
        seeds: One picture per seed.

    Returns:
        Concept -> image and text alignment of the base's pictures, and image alignment of real pictures.
    """
    bank, noun, text, real = ConceptBank(backbone.layout), {}, {}, {}
    for task in tasks:
        prompts = [task.noun_prompts[i % len(task.noun_prompts)] for i in range(len(seeds))]
        images, references = sample(backbone, bank, prompts, seeds,
                                    settings), encoder.features(task.references, task.kind)
        noun[task.name] = metrics.image_alignment(encoder.features(images, task.kind), references)
        text[task.name] = metrics.text_alignment(encoder.image_text_features(images),
                                                 encoder.caption_features(prompts))
        held_out = encoder.features(task.held_out, task.kind) if len(task.held_out) else references[:0]
        real[task.name] = _real_alignment(references, held_out)
    return noun, text, real


def untrained(noun: Mapping[str, float], text: Mapping[str, float], real: Mapping[str, float]
              ) -> dict[str, float]:
    """Means over concepts of the three levels."""
    names = {"image_alignment": noun, "text_alignment": text, "real_pictures": real}
    return {name: sum(values.values()) / len(values) for name, values in names.items()}


def halfway(noun: Mapping[str, float], real: Mapping[str, float]) -> dict[str, float]:
    """Concept -> alignment halfway between class noun and real pictures.

    Above this level the individual counts as present.
    """
    return {name: (noun[name] + real[name]) / 2 for name in noun}

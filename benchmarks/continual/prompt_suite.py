"""Prompt suites: tasks, prompts, seeds and judges of a sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from torch import Tensor

from ...core.data.assignment import Assignment
from ...core.demo.scenes import article
from ...core.evaluation.protocol import Encoder
from ...core.images import spread
from ...core.model.backbone import Backbone
from ...core.sampling.settings import SampleSettings
from ...core.training.config import TrainingConfig
from .judges import Judges
from .runs import Run

Names = tuple[tuple[str, ...], ...]
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
        encoder: Features of pictures and captions, for the metrics of the papers.
        judges: Name -> judge. `encoder` is the first.
        settings: Sampling settings.
        seeds, group_seeds, pair_seeds: Seeds of the pictures per concept, per group and per pair.
        unet_weights: Number of weights of the base's UNet.
        together: Group or pair -> real pictures of it `[N, 3, H, W]`; empty where there are none.
        noun_seeds: Seeds of the pictures of class nouns per concept; empty = `seeds`.
        origin: Other factors that affect the figures (base, data, ...), as JSON values.
    """

    tasks: tuple[Assignment, ...]
    groups: Names
    pairs: Names
    combined: tuple[str, ...]
    unrelated: tuple[str, ...]
    encoder: Encoder
    judges: Judges
    settings: SampleSettings
    seeds: tuple[int, ...]
    group_seeds: tuple[int, ...]
    pair_seeds: tuple[int, ...]
    unet_weights: int
    together: Mapping[tuple[str, ...], Tensor] = field(default_factory=dict)
    noun_seeds: tuple[int, ...] = ()
    origin: Mapping = field(default_factory=dict)

    def named(self, name: str) -> Assignment:
        return next(task for task in self.tasks if task.name == name)


@dataclass(frozen=True)
class Benchmark:
    """Inputs of the runs of one command.

    Attributes:
        backbone: The base.
        suite: Tasks, prompts and seeds.
        training: Steps and seed -> configuration.
        settings_of: Method -> its settings.
        steps_of: Method -> its steps per task.
    """

    backbone: Backbone
    suite: PromptSuite
    training: Callable[[int, int], TrainingConfig]
    settings_of: Callable[[str], Mapping]
    steps_of: Callable[[str], int]

    def configured(self, run: Run) -> tuple[dict, TrainingConfig]:
        """The settings of a run's method and its training configuration, overrides included."""
        return ({**self.settings_of(run.method), **run.settings()},
                self.training(run.steps(self.steps_of(run.method)), run.seed))


def listed(phrases: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(part for part in (", ".join(phrases[:-1]), phrases[-1]) if part)


def prompts_together(suite: PromptSuite, group: Sequence[str], count: int, nouns: bool = False) -> list[str]:
    """`count` prompts that name a group's concepts, or their class nouns."""
    phrases = [article(suite.named(name).class_noun) if nouns else f"<{name}>" for name in group]
    return [suite.combined[i % len(suite.combined)].format(listed(phrases)) for i in range(count)]


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

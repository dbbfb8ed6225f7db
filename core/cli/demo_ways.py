"""The ways that the demo compares: how each one learns the concepts, and what it draws with them.

Learning and drawing are jobs that may run in processes of their own. They pass banks on as files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..bank.bank import ConceptBank
from ..bank.concepts import Concept
from ..bank.format import open_bank, save_bank
from ..data.assignment import Assignment
from ..data.framing import Framing
from ..data.training_set import prepare
from ..demo.base import load_base
from ..demo.bases import EMBEDDED, TRANSFORMERS, file_of
from ..demo.judges import assignment
from ..evaluation.protocol import words_for
from ..hosts.modules import ModuleBackbone
from ..methods import DEFAULT
from ..methods.base import Task, make
from ..regional.regions import Region
from ..sampling.regions import sample_regions
from ..sampling.sampling import sample
from ..sampling.settings import SampleSettings
from ..training.config import TrainingConfig
from ..training.loop import learn
from .workers import Steps

TASKS = ("rex", "fido", "blueprint")      # two dogs and a style
SEED = 100
PAIR = "a photo of <rex> and <fido>"
STYLED = "<blueprint> of <rex>"
SCENE = "a photo of a dog and a dog in a meadow"
# Each region's prompt describes the whole scene. With a single animal per prompt, both regions would draw it
# in the middle.
REGIONS = (
    Region("a photo of <rex> and a dog in a meadow", box=(0.1, 0.0, 1.0, 0.5)),
    Region("a photo of a dog and <fido> in a meadow", box=(0.1, 0.5, 1.0, 1.0)),
)


@dataclass(frozen=True)
class Plan:
    """How much the demo does.

    Attributes:
        base: Name of the embedded base.
        steps: Of learning a concept, with four pictures each.
        sampler_steps: Of drawing.
        alone, together: Pictures of one concept, and of two.
        seed: Of learning.
        rates: Factor on the rates of all ways.
    """

    base: str = EMBEDDED
    steps: int = 75
    sampler_steps: int = 12
    alone: int = 4
    together: int = 6
    seed: int = 0
    rates: float = 1.0

    @property
    def backbone(self) -> ModuleBackbone:
        return _loaded(self.base)

    @property
    def side(self) -> int:
        return self.backbone.picture_size

    @property
    def tasks(self) -> tuple[Assignment, ...]:
        return _drawn(self.side)

    @property
    def training(self) -> TrainingConfig:
        return TrainingConfig(steps=self.steps, batch_size=4, resolution=self.side, flip=True,
                              schedule="cosine", warmup=self.steps // 10, seed=self.seed)

    @property
    def settings(self) -> SampleSettings:
        return SampleSettings(steps=self.sampler_steps, cfg=3.0, size=(self.side, self.side))


# What differs on a transformer. At higher rates, two dogs in one prompt mix more.
_ON_TRANSFORMERS: Mapping = {"steps": 200, "rates": 0.5}


def plan_of(base: str) -> Plan:
    """The demo's plan on an embedded base."""
    return Plan(base, **(_ON_TRANSFORMERS if base in TRANSFORMERS else {}))


@cache
def _loaded(base: str) -> ModuleBackbone:
    return load_base(file_of(base))


@cache
def _drawn(side: int) -> tuple[Assignment, ...]:
    return tuple(assignment(name, size=side) for name in TASKS)


@dataclass(frozen=True)
class Way:
    """One way to have three concepts.

    Attributes:
        title: What the report calls it.
        method: Id of the method.
        settings: Rates of the method.
        separate: Whether each concept is learned into a bank of its own, which does not depend on others.
    """

    title: str
    method: str
    settings: Mapping[str, float]
    separate: bool


WAYS = {
    "ours": Way("Continual Concepts", DEFAULT, {"lr": 8e-3, "token_lr": 4e-2}, True),
    "stacked": Way("One LoRA per concept, stacked", "lora", {"lr": 8e-3, "token_lr": 4e-2}, True),
    "sequence": Way("One LoRA, concept after concept", "finetune", {"lr": 8e-3, "token_lr": 4e-2}, False),
}


# Way and concept -> the way that learns it. The default learns a style as `lora` does, and `finetune` learns
# its first concept as `lora` does. So the same settings and seed give the same weights.
ALIKE = {("stacked", "blueprint"): "ours", ("stacked", TASKS[0]): "sequence"}


def parts_of(way: str) -> list[list[str]]:
    """Names of the concepts of each job that learns for this way alone."""
    if not WAYS[way].separate:
        return [list(TASKS)]
    return [[name] for name in TASKS if (way, name) not in ALIKE]


def users_of(way: str, names: Sequence[str]) -> dict[str, list[str]]:
    """The ways that draw with what a job learns for `way`, and the concepts that each of them takes."""
    borrowed = {other: [name for name in names if ALIKE.get((other, name)) == way] for other in WAYS}
    return {way: list(names), **{other: taken for other, taken in borrowed.items() if taken}}


@dataclass(frozen=True)
class Pictures:
    """What a way draws, each `[B, 3, H, W]` in -1..1.

    Attributes:
        alone: Every concept at the end.
        first: The first concept after each task, from one seed.
        pair, boxes: Both objects in one prompt, and in one box each.
        styled: The first object in the learned style.
    """

    alone: list[Tensor]
    first: list[Tensor]
    pair: Tensor
    boxes: Tensor
    styled: Tensor


def learn_job(plan: Plan, way: str, names: Sequence[str], folder: Path) -> dict[str, float]:
    """Learns concepts one after another. Writes `<way>-<name>.safetensors`, the bank after each, into
    `folder`.

    Returns:
        The seconds that each concept took.
    """
    chosen, backbone, training = WAYS[way], plan.backbone, plan.training
    bank, seconds = ConceptBank(backbone.layout), {}
    for task in (task for task in plan.tasks if task.name in names):
        began = time.perf_counter()
        data = prepare(backbone, task.pictures, task.name, task.class_noun,
                       Framing(training.resolution, training.framing, training.flip))
        to_learn = Task(task.name, task.class_noun, backbone, bank, task.kind,
                        words_for(chosen.method, task), torch.Generator().manual_seed(training.seed))
        settings = {name: plan.rates * rate for name, rate in chosen.settings.items()}
        bank = learn(to_learn, make(chosen.method, settings), data, training, Steps.count).bank
        save_bank(bank, folder / f"{way}-{task.name}.safetensors")
        seconds[task.name] = time.perf_counter() - began
    return seconds


def as_of(method: str, concept: Concept) -> Concept:
    """A concept that another method learned alike, as one of this method: it composes as this method's do."""
    composition = make(method).composition_of_kind(concept.info.kind)
    return replace(concept, info=replace(concept.info, method=method, composition=composition))


def banks_of(way: str, folder: Path) -> list[ConceptBank]:
    """The bank of a way after each task."""
    stored = [open_bank(folder / f"{ALIKE.get((way, name), way)}-{name}.safetensors") for name in TASKS]
    if not WAYS[way].separate:
        return stored
    banks = [ConceptBank(stored[0].layout)]
    for name, own in zip(TASKS, stored, strict=True):
        banks.append(banks[-1].add(as_of(WAYS[way].method, own[name]) if (way, name) in ALIKE else own[name]))
    return banks[1:]


def _sampled(plan: Plan, bank: ConceptBank, prompts: Sequence[str], count: int) -> Tensor:
    return sample(plan.backbone, bank, [prompts[i % len(prompts)] for i in range(count)],
                  range(SEED, SEED + count), plan.settings)


def _boxes(plan: Plan, bank: ConceptBank) -> Tensor:
    seeds = range(SEED, SEED + plan.together)
    return sample_regions(plan.backbone, bank, SCENE, REGIONS, seeds, plan.settings)


def _first(plan: Plan, banks: Sequence[ConceptBank]) -> list[Tensor]:
    """The first concept after each task. The last picture is drawn anew in any case, because it shows what is
    retained. Before that, banks that hold the same of the concept share a picture.
    """
    name = TASKS[0]
    drawn: list[Tensor] = []
    for place, bank in enumerate(banks):
        same = 0 < place < len(banks) - 1 and bank[name] is banks[place - 1][name]
        drawn.append(drawn[-1] if same else _sampled(plan, bank, plan.tasks[0].prompts, 1))
    return drawn


# field of `Pictures` -> how it is drawn, with the banks after each task
FIELDS: Mapping[str, Callable] = {
    "alone": lambda plan, banks: [_sampled(plan, banks[-1], task.prompts, plan.alone) for task in plan.tasks],
    "first": _first,
    "pair": lambda plan, banks: _sampled(plan, banks[-1], [PAIR], plan.together),
    "boxes": lambda plan, banks: _boxes(plan, banks[-1]),
    "styled": lambda plan, banks: _sampled(plan, banks[-1], [STYLED], plan.alone),
}


def draw_job(plan: Plan, way: str, field: str, folder: Path) -> Tensor | list[Tensor]:
    """Draws one field of a way's `Pictures` with the banks that `learn_job` wrote."""
    return FIELDS[field](plan, banks_of(way, folder))


def pictures_of(plan: Plan, way: str, folder: Path) -> Pictures:
    """All that a way draws."""
    drawn: dict = {field: draw_job(plan, way, field, folder) for field in FIELDS}
    return Pictures(**drawn)


def noun_job(plan: Plan) -> list[Tensor]:
    """Draws the class noun of every concept with the base alone. Concepts of one class share pictures."""
    nothing, drawn = ConceptBank(plan.backbone.layout), {}
    for prompts in (task.noun_prompts for task in plan.tasks):
        if prompts not in drawn:
            drawn[prompts] = _sampled(plan, nothing, prompts, plan.alone)
    return [drawn[task.noun_prompts] for task in plan.tasks]

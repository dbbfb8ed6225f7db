"""The continual protocol: learn tasks in order, and evaluate all concepts so far after each task."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..bank.bank import ConceptBank
from ..data.assignment import Assignment
from ..data.framing import Framing
from ..data.training_set import prepare
from ..methods.base import METHODS, Task, make
from ..model.backbone import Backbone
from ..sampling.sampling import sample
from ..sampling.settings import SampleSettings
from ..training.config import TrainingConfig
from ..training.loop import Callback, learn
from . import metrics


class Encoder(Protocol):
    """Interface of a metric encoder. All features have unit length; pictures are `[B, 3, H, W]` in -1..1."""

    def features(self, images: Tensor, kind: str) -> Tensor:
        """Features `[B, D]` for comparing pictures of one kind (object or style)."""
        ...

    def image_text_features(self, images: Tensor) -> Tensor:
        """Features `[B, D]` of pictures for comparing with texts."""
        ...

    def caption_features(self, captions: Sequence[str]) -> Tensor:
        """Features `[B, D]` of texts in the space of `image_text_features`."""
        ...


@dataclass
class Record:
    """Results of a method on a sequence. Indices `[i][j]` of `image_alignment`, `text_alignment` and
    `samples` mean concept j after task i.
    """

    method: str
    bank: ConceptBank
    image_alignment: list[list[float]] = field(default_factory=list)
    text_alignment: list[list[float]] = field(default_factory=list)
    samples: list[list[Tensor]] = field(default_factory=list)
    losses: list[tuple[float, ...]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def retention(self) -> list[float]:
        return metrics.retention(self.image_alignment)


def words_for(method: str, task: Assignment) -> tuple[str, ...]:
    """The task's words, or none for methods with another number of words."""
    return task.words if METHODS[method].method.words_of_kind(task.kind) == len(task.words) else ()


def measure(
    backbone: Backbone,
    bank: ConceptBank,
    task: Assignment,
    prompts: Sequence[str],
    encoder: Encoder,
    settings: SampleSettings,
    seeds: Sequence[int],
) -> tuple[Tensor, float, float]:
    """Samples and evaluates a task's concept.

    Args:
        prompts: Prompts with the placeholder, repeated until there is one per seed.

    Returns:
        Pictures `[B, 3, H, W]`, their IA with the training pictures, and their TA.
    """
    asked = [bank.parse(prompts[i % len(prompts)]) for i in range(len(seeds))]
    images = sample(backbone, bank, asked, seeds, settings)
    texts = [prompt.plain(bank.infos) for prompt in asked]
    alignment = metrics.image_alignment(encoder.features(images, task.kind),
                                        encoder.features(task.references, task.kind))
    return images, alignment, metrics.text_alignment(encoder.image_text_features(images),
                                                     encoder.caption_features(texts))


def run_sequence(
    backbone: Backbone,
    tasks: Sequence[Assignment],
    method: str,
    method_settings: Mapping,
    training: TrainingConfig,
    encoder: Encoder,
    settings: SampleSettings,
    seeds: Sequence[int],
    progress: Callable[[str], Callback | None] = lambda _: None,
) -> Record:
    """Learns tasks in order with one method, and evaluates all concepts so far after each.

    Args:
        method_settings: Settings of the method; missing ones have default values.
        seeds: One picture per seed and concept.
        progress: Takes a task's name, returns the training loop's callback.
    """
    bank = ConceptBank(backbone.layout)
    record = Record(method, bank)
    for i, task in enumerate(tasks):
        data = prepare(backbone, task.pictures, task.name, task.class_noun,
                       Framing(training.resolution, training.framing, training.flip))
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(training.seed)
        learned = learn(
            Task(task.name, task.class_noun, backbone, bank, task.kind, words_for(method, task), generator),
            make(method, method_settings),
            data,
            training,
            progress(task.name),
        )
        record.seconds += time.perf_counter() - began
        bank = learned.bank
        measured = [measure(backbone, bank, tasks[j], tasks[j].prompts, encoder, settings, seeds)
                    for j in range(i + 1)]
        record.samples.append([pictures for pictures, _, _ in measured])
        record.image_alignment.append([alignment for _, alignment, _ in measured])
        record.text_alignment.append([alignment for _, _, alignment in measured])
        record.losses.append(learned.losses)
    record.bank = bank
    return record

"""The method interface: hooks that the trainer calls. Their defaults train a concept's words and adapters.

A method is one file: settings, mathematics, and a class with hooks that is decorated with `register`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..attention.adapters import AdapterProcessor, Adapters
from ..bank.bank import ConceptBank
from ..bank.composition import PROMPT, Composition
from ..bank.concepts import Concept
from ..bank.tokens import TokenGroup, default_words
from ..conditioning.learned_words import LearnedWords, Words
from ..data.batch import Batch
from ..data.training_set import TrainingData
from ..errors import ConceptError
from ..model.backbone import Backbone
from ..model.context import Context
from ..model.deltas import Delta, DeltaKey, Deltas, LowRankDelta, weighted_sum
from ..model.processor import AttentionProcessor
from ..model.storage import stored_dtype
from ..neurons.neurons import NeuronSelection
from ..settings import Limit, above, at_least, between, check, setting

RANK, SHARE = between(1, 128), above(0, 1)


@dataclass(frozen=True)
class MethodConfig:
    """Settings of every method. A method's own class adds fields and replaces defaults.

    lr, token_lr: learning rates of deltas and words; layerwise: one vector per word and layer copy, else one
    per word; first_std: spread of the first word's start, 0 = that of the vocabulary; stored: type of the
    bank's tensors. limits: allowed values of fields; numbers that it does not list are 0 or more.
    """

    lr: float = setting(1e-4, "Learning rate of the deltas.", 1e-6, 2e-2)
    token_lr: float = setting(1e-3, "Learning rate of the words.", 1e-6, 0.2)
    layerwise: bool = setting(True, "One vector per word and layer, or one for all layers, which exports as "
                                    "an embedding.")
    first_std: float = 0.0
    stored: str = "float16"
    limits: ClassVar[Mapping[str, Limit]] = {}

    def __post_init__(self) -> None:
        numbers = {f.name: at_least(0) for f in fields(self) if type(f.default) in (int, float)}
        check(self, {**numbers, "rank": RANK, **self.limits})
        stored_dtype(self.stored)


@dataclass(frozen=True)
class Task:
    """What to learn, on which base and bank. words: names of the learned words, empty for default ones;
    encode: the user's image encoder, pictures `[B, 3, H, W]` in -1..1 to features `[B, F]`, or None; refined:
    the bank with the concept that learning goes on from, None for a new one; parent: for a variant, the
    concept that it starts from. `bank` lacks the concept."""

    name: str
    class_noun: str
    backbone: Backbone
    bank: ConceptBank
    kind: str = "object"
    words: tuple[str, ...] = ()
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    encode: Callable[[Tensor], Tensor] | None = None
    refined: ConceptBank | None = None
    parent: Concept | None = None

    @property
    def start(self) -> Concept | None:
        """The stored concept that learning goes on from, under the task's name; None for a new one."""
        if self.refined is not None:
            return self.refined[self.name]
        return None if self.parent is None else self.parent.renamed(self.name)

    def grown(self, concept: Concept, shared: Mapping[str, Mapping[str, Tensor]]) -> ConceptBank:
        """The bank with the learned concept: at the end, or in its place if it was refined."""
        return (self.bank.add(concept, shared) if self.refined is None
                else self.refined.replace(concept, shared))

    @property
    def word_names(self) -> tuple[str, ...]:
        return self.words or default_words(self.name, 2)

    def worded(self, count: int) -> Task:
        """This task with its words named: the given names, or `count` default ones."""
        return self if self.words else replace(self, words=default_words(self.name, count))

    def earlier(self, method: str) -> list[Concept]:
        """The bank's concepts of one method, in the order in which they were learned."""
        return [self.bank.passing(name) for name, info in self.bank.infos.items() if info.method == method]

    def earlier_sum(self, method: str) -> dict[DeltaKey, Delta]:
        """The sum of the deltas of those concepts, by projection."""
        parts: dict[DeltaKey, list[tuple[float, Delta]]] = {}
        for concept in self.earlier(method):
            for key, delta in concept.deltas.items():
                parts.setdefault(key, []).append((1.0, delta))
        return {key: weighted_sum(deltas) for key, deltas in parts.items()}

    def draw_seed(self) -> int:
        """A seed for random numbers that a resumed run must draw again."""
        return int(torch.randint(2**31, (1,), generator=self.generator))


def low_rank_deltas(concepts: list[Concept], key: DeltaKey) -> list[LowRankDelta]:
    """The low-rank deltas that concepts have of one projection."""
    return [delta for concept in concepts if isinstance(delta := concept.deltas.get(key), LowRankDelta)]


def total(terms: Iterable[Tensor]) -> Tensor:
    """The sum of scalars, with gradient; 0 for none."""
    return sum(terms, torch.zeros(()))


@dataclass(frozen=True)
class Forward:
    """One training forward pass: its batch and context, timesteps `[B]`, noisy latents, the target, the
    UNet's output `[B, C, h, w]` with gradient, and autocast's type, None without autocast."""

    batch: Batch
    context: Context
    timesteps: Tensor
    noisy: Tensor
    target: Tensor
    output: Tensor
    precision: torch.dtype | None = None


@dataclass(frozen=True)
class Outcome:
    """A finished task: the concept's tokens and deltas, and the method's shared state for the next task."""

    tokens: TokenGroup
    deltas: Deltas
    shared: Mapping[str, Tensor] = field(default_factory=dict)


class Method(ABC):
    """One way to learn a concept. An instance serves one task.

    Attributes:
        composition: how its concepts act together, see bank.composition and `composition_of_kind`.
        builds_on_sum: whether a method of summed deltas trains on top of its earlier tasks.
        wants_prior: whether its paper trains with prior-preservation pictures.
        word_count: words of a concept whose words are not named, see `words_of_kind`.
        learns_alone: whether it uses more of a forward pass than its parameters' gradients. Several
            processes, each with a share of the batch, would then disagree.
        describes_pictures: whether it uses the task's image encoder.
        needs_words: whether it learns words and does not work with class nouns; see `check_base`.
        refinable: whether learning can go on from a stored concept, see `start_from`.
        published_mode: the paper's aggregation mode, see conditioning.routing; benchmarks sample with it.
        extra_key: name of `extra_state` in checkpoints, "" for a method without one.
        steps, batches: finished optimiser steps, and batches so far in this step. The trainer counts.
    """

    name: ClassVar[str]
    composition: ClassVar[Composition] = PROMPT
    builds_on_sum: ClassVar[bool] = True
    word_count: ClassVar[int] = 2
    wants_prior: ClassVar[bool] = False
    learns_alone: ClassVar[bool] = False
    describes_pictures: ClassVar[bool] = False
    needs_words: ClassVar[bool] = True
    refinable: ClassVar[bool] = False
    published_mode: ClassVar[str] = "sharp"
    extra_key: ClassVar[str] = ""
    steps: int = 0
    batches: int = 0

    config: MethodConfig
    task: Task
    words: Words
    adapters: Adapters

    def __init__(self, config: MethodConfig) -> None:
        self.config = config

    @classmethod
    def words_of_kind(cls, kind: str) -> int:
        """Words of a concept of a kind whose words are not named."""
        return cls.word_count

    def composition_of_kind(self, kind: str) -> Composition:
        """How a concept of a kind acts together with others, with this method's settings."""
        return self.composition

    def use_selection(self, selection: NeuronSelection) -> None:
        """Trains these neurons only; called before `begin`. Raises ConceptError if the method has none."""
        able = [name for name, entry in METHODS.items()
                if entry.method.use_selection is not Method.use_selection]
        raise ConceptError(f"method '{self.name}' cannot use a neuron selection; methods that can: "
                           f"{', '.join(sorted(able))}")

    def begin(self, task: Task) -> None:
        """Creates the trainable parameters of a task."""
        c, self.task = self.config, task
        self.words = LearnedWords(task.backbone, task.name, task.word_names, task.class_noun, c.layerwise,
                                  c.first_std, task.generator)
        if not task.backbone.layout.takes_words:
            self.words.fix_to_noun(task.backbone, task.class_noun)
        self.adapters = self.make_adapters()

    def start_from(self, concept: Concept) -> None:
        """Sets the parameters to those of a stored concept, after `begin`; only with `refinable`. `finish`
        then returns the stored tensors, bit for bit. Raises ConceptError if it does not fit the settings."""
        assert isinstance(self.words, LearnedWords)
        self.words.load(concept.tokens)
        self.adapters.load(concept.deltas)

    @abstractmethod
    def make_adapters(self) -> Adapters:
        """The trainable deltas of the task, at their start."""

    def on_data(self, data: TrainingData) -> None:  # noqa: B027 - a hook: most methods need none
        """Receives the training set once, after `begin` and before deltas are folded in."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser, float32 whatever the base's type."""
        trained = [parameter for parameter in self.adapters.parameters() if parameter.requires_grad]
        words = [parameter for parameter in self.words.parameters() if parameter.requires_grad]
        groups = [{"params": words, "lr": self.config.token_lr}, {"params": trained, "lr": self.config.lr}]
        return groups if words else groups[1:]

    def token_group(self) -> TokenGroup:
        """The concept's words as trained so far, with gradient."""
        return self.words.group()

    def processor(self) -> AttentionProcessor:
        """The attention processor of a training forward pass."""
        return AdapterProcessor(self.adapters)

    def begin_step(self) -> None:
        """Forgets what an unfinished step has left. Runs again if a step begins anew with less memory."""
        self.batches = 0

    def end_step(self) -> None:  # noqa: B027 - a hook: most methods need none
        """Keeps what a step has gathered, after the optimiser's step and before `after_step`."""

    def on_batch(self, batch: Batch) -> Batch:
        """May extend or replace a batch (replay). What it returns is trained on, unchanged."""
        return batch

    def next_batch(self, batch: Batch) -> Batch:
        """What `on_batch` makes of a batch of the trainer, counted."""
        batch = self.on_batch(batch)
        self.batches += 1
        return batch

    def penalty(self, seen: Forward) -> dict[str, Tensor]:
        """Named terms that are added to the denoising loss; most methods have none in their first task."""
        return {}

    def after_step(self, step: int) -> None:
        """Runs after the optimiser's step: masking, clipping, the second step of an alternating scheme."""
        self.steps, self.batches = step, 0

    def monitors(self) -> dict[str, float]:
        """Named figures of the method's state after a step, for display. They are part of no loss."""
        return {}

    def recorded(self, dtype: torch.dtype) -> Deltas:
        """The deltas of the concept's record, detached, in the bank's type."""
        return self.adapters.stored(dtype)

    def shared_state(self) -> dict[str, Tensor]:
        """What the method carries to its next task beside the concepts."""
        return {}

    @torch.no_grad()
    def finish(self) -> Outcome:
        """The learned concept, detached."""
        dtype = stored_dtype(self.config.stored)
        return Outcome(self.words.stored(dtype), self.recorded(dtype), self.shared_state())

    def parts(self) -> dict[str, nn.Module]:
        """The modules with trainable parameters, by their names in checkpoints."""
        return {"words": self.words, "adapters": self.adapters}

    def extra_state(self) -> Any:
        """What a checkpoint must hold beside the modules, under `extra_key`: tensors and JSON values."""
        return None

    def load_extra_state(self, state: Any) -> None:  # noqa: B027 - most methods have none
        """Restores what `extra_state` returned."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that a checkpoint of this task must hold."""
        state: dict[str, Any] = nn.ModuleDict(self.parts()).state_dict()
        return state | ({self.extra_key: self.extra_state()} if self.extra_key else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned. Raises KeyError or RuntimeError if it does not fit."""
        parts = nn.ModuleDict(self.parts())
        parts.load_state_dict({name: state[name] for name in state if name.split(".")[0] in parts})
        if self.extra_key:
            self.load_extra_state(state[self.extra_key])


@dataclass(frozen=True)
class Registered:
    """A method with its configuration class and one sentence for lists."""

    config: type
    method: type[Method]
    summary: str


METHODS: dict[str, Registered] = {}
T = TypeVar("T", bound=Method)


def register(name: str, config: type, summary: str) -> Callable[[type[T]], type[T]]:
    """Makes the decorated method known by name."""
    if name != name.lower() or name in METHODS:
        raise ConceptError(f"method name {name!r} must be lower case and new; taken: "
                           f"{', '.join(sorted(METHODS))}")

    def registered(method: type[T]) -> type[T]:
        method.name = name
        METHODS[name] = Registered(config, method, summary)
        return method

    return registered


def get(name: str) -> Registered:
    """Looks up a method. Raises ConceptError for an unknown name."""
    if name not in METHODS:
        raise ConceptError(f"unknown method {name!r}; known: {', '.join(sorted(METHODS))}")
    return METHODS[name]


def make(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """A method with its settings. Raises ConceptError for unknown methods, settings and values."""
    entry, settings = get(name), settings or {}
    allowed = {f.name for f in fields(entry.config)}
    unknown = sorted(set(settings) - allowed)
    if unknown:
        raise ConceptError(f"method '{name}' has no setting {unknown[0]!r}; it has "
                           f"{', '.join(sorted(allowed))}")
    return entry.method(entry.config(**settings))

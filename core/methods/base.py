"""The method interface: a strategy that the one training loop calls, and nothing else of it.

A method is a file: config + maths + strategy + `register(...)` at the bottom. The loop knows no method by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..bank.bank import ConceptBank
from ..bank.composition import PROMPT, Composition
from ..bank.tokens import TokenGroup, default_words, initial_vectors
from ..data.batch import Batch
from ..data.training_set import TrainingData
from ..errors import ConceptError
from ..model.backbone import AttentionProcessor, Backbone, Context
from ..model.deltas import DeltaKey, Deltas, LowRankDelta
from ..model.sites import PROJECTIONS, Site, SiteLayout


@dataclass(frozen=True)
class Task:
    """What is to be learned next, on top of which bank. words: names of the learned words (default: two after the concept)."""

    name: str
    class_noun: str
    backbone: Backbone
    bank: ConceptBank
    kind: str = "object"
    words: tuple[str, ...] = ()
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def word_names(self) -> tuple[str, ...]:
        return self.words or default_words(self.name, 2)

    def worded(self, count: int) -> Task:
        """This task with its words named: as a person named them, else `count` after the concept."""
        return self if self.words else replace(self, words=default_words(self.name, count))


@dataclass(frozen=True)
class Forward:
    """What one training forward pass saw: the batch, its context, timesteps `[B]`, noisy latents and the UNet's output `[B, C, h, w]`
    (with gradient), the target that the output is compared with."""

    batch: Batch
    context: Context
    timesteps: Tensor
    noisy: Tensor
    target: Tensor
    output: Tensor


@dataclass(frozen=True)
class Outcome:
    """What a finished task leaves: the concept's tokens and deltas, and the method's shared state for the next task."""

    tokens: TokenGroup
    deltas: Deltas
    shared: Mapping[str, Tensor] = field(default_factory=dict)


class Method(ABC):
    """One way to learn a concept. An instance lives for one task.

    composition: how its concepts act together, see bank.composition.
    builds_on_sum: whether a "sum" method learns on top of what its earlier tasks did to the weights, or each task on the base alone.
    wants_prior: whether its paper trains with prior-preservation pictures beside the concept's own.
    word_count: how many words a concept gets whose words nobody named.
    learns_alone: whether it depends on more of a pass than the gradients of its parameters, so that several processes, each with its share
    of the batch, would not agree.
    """

    name: ClassVar[str]
    composition: ClassVar[Composition] = PROMPT
    builds_on_sum: ClassVar[bool] = True
    word_count: ClassVar[int] = 2
    wants_prior: ClassVar[bool] = False
    learns_alone: ClassVar[bool] = False

    @abstractmethod
    def begin(self, task: Task) -> None:
        """Creates the trainables for a task."""

    def on_data(self, data: TrainingData) -> None:  # noqa: B027 - a hook: most methods need none
        """Once after `begin`, before the first step, while nothing is folded into the weights: the task's whole training set (for a memory
        of pictures; a resumed run comes through here as well)."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimiser: `{"params", "lr"}`; fp32 whatever the base's type."""

    @abstractmethod
    def token_group(self) -> TokenGroup:
        """The new concept's words as trained so far, with gradient."""

    @abstractmethod
    def processor(self) -> AttentionProcessor:
        """What sites do in training."""

    def on_batch(self, batch: Batch) -> Batch:
        """May add to or replace the batch (replay)."""
        return batch

    def penalty(self, seen: Forward) -> dict[str, Tensor]:
        """Named terms added to the denoising loss, after the forward pass. None before the second task unless the method says so."""
        return {}

    def after_step(self, step: int) -> None:  # noqa: B027 - a hook: most methods need none
        """After the optimiser's step: masking, clipping, second steps of alternating schemes."""

    def monitors(self) -> dict[str, float]:
        """Named figures of the method's state after a step, for people to look at; they are part of no loss."""
        return {}

    @abstractmethod
    def finish(self) -> Outcome:
        """The learned concept, detached."""

    @abstractmethod
    def modules(self) -> nn.ModuleDict:
        """Everything that a checkpoint of this task must hold."""


class LearnedWords(nn.Module):
    """Trainable token vectors: one parameter `[L, n, D]` per text encoder, started as CIDM does (see tokens.initial_vectors)."""

    def __init__(self, task: Task, layerwise: bool, first_std: float = 0.0) -> None:
        super().__init__()
        self.names = task.word_names
        copies = task.backbone.layout.copies if layerwise else 1
        self.vectors = nn.ParameterDict()
        for encoder in task.backbone.text:
            ids = encoder.ids(task.class_noun) if task.class_noun else []
            if len(self.names) > 1 and not ids:
                raise ConceptError(f"class noun of concept '{task.name}' is empty; {len(self.names)} words need one to start from")
            known = encoder.vectors(ids) if ids else torch.zeros(0, encoder.width)
            std = first_std or float(encoder.vectors(list(range(256))).std())      # 256: the bytes, in every CLIP vocabulary
            start = initial_vectors(known, len(self.names), copies, std, task.generator)
            self.vectors[encoder.name] = nn.Parameter(start.to(task.backbone.device))

    def group(self) -> TokenGroup:
        return TokenGroup(self.names, dict(self.vectors.items()))

    def stored(self, dtype: torch.dtype) -> TokenGroup:
        return TokenGroup(self.names, {name: kept(v, dtype) for name, v in self.vectors.items()})

    def mean_norm(self) -> float:
        """Mean length of the learned vectors, over encoders, copies and words."""
        return float(torch.stack([v.detach().norm(dim=-1).mean() for v in self.vectors.values()]).mean())


def adapter_key(index: int, projection: str) -> str:
    return f"{index}-{projection}"


class LowRankAdapters(nn.Module):
    """Trainable factors for the chosen projections of every site: `down` Kaiming-uniform, `up` zero, so training starts at the base."""

    def __init__(self, layout: SiteLayout, rank: int, scale: float, generator: torch.Generator, device, projections=PROJECTIONS) -> None:
        super().__init__()
        self.scale, self.keys = scale, [(site.index, projection) for site in layout.sites for projection in projections]
        self.up, self.down = nn.ParameterDict(), nn.ParameterDict()
        for index, projection in self.keys:
            a, b = layout.sites[index].shape(projection)
            bound = (1.0 / b) ** 0.5     # kaiming_uniform_(a=sqrt(5)) of a [r, b] matrix
            down = (torch.rand(rank, b, generator=generator) * 2 - 1) * bound
            self.down[adapter_key(index, projection)] = nn.Parameter(down.to(device))
            self.up[adapter_key(index, projection)] = nn.Parameter(torch.zeros(a, rank, device=device))

    def delta(self, index: int, projection: str) -> LowRankDelta | None:
        key = adapter_key(index, projection)
        return LowRankDelta(self.up[key], self.down[key], self.scale) if key in self.up else None

    def stored(self, dtype: torch.dtype) -> dict[DeltaKey, LowRankDelta]:
        """Detached copies on the CPU in the bank's type."""
        return kept_deltas({key: d for key in self.keys if (d := self.delta(*key)) is not None}, dtype)


class AdapterProcessor(AttentionProcessor):
    """Adds trainable deltas to the projections while training."""

    def __init__(self, adapters: LowRankAdapters) -> None:
        self.adapters = adapters

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        delta = self.adapters.delta(site.index, projection)
        return y if delta is None else y + delta.apply(x).to(y.dtype)


STORED_TYPES = {"float16": torch.float16, "float32": torch.float32}


def stored_dtype(name: str) -> torch.dtype:
    if name not in STORED_TYPES:
        raise ConceptError(f"stored type is {name!r}; allowed: {', '.join(STORED_TYPES)}")
    return STORED_TYPES[name]


def wide_enough(dtype: torch.dtype, tensors: Iterable[Tensor]) -> torch.dtype:
    """The bank's type for tensors that are stored together: float32 where a number is too large for `dtype`, so that storing makes nothing
    infinite."""
    tops = [tensor.detach().abs().amax() for tensor in tensors if tensor.numel()]
    return torch.float32 if tops and torch.stack(tops).max() > torch.finfo(dtype).max else dtype


def kept(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A detached copy on the CPU in the bank's type."""
    return tensor.detach().to(wide_enough(dtype, [tensor])).cpu().clone()


def kept_deltas(deltas: Mapping[DeltaKey, LowRankDelta], dtype: torch.dtype) -> dict[DeltaKey, LowRankDelta]:
    """Detached copies on the CPU, all in one type, as their file has them."""
    dtype = wide_enough(dtype, (tensor for delta in deltas.values() for tensor in delta.tensors()))
    return {key: LowRankDelta(d.up.detach().to(dtype).cpu().clone(), d.down.detach().to(dtype).cpu().clone(), d.scale)
            for key, d in deltas.items()}


def require(condition: bool, setting: str, value, allowed: str) -> None:
    """Refuses a setting with one sentence."""
    if not condition:
        raise ConceptError(f"setting '{setting}' is {value!r}; allowed: {allowed}")


@dataclass(frozen=True)
class Registered:
    name: str
    config: type
    build: Callable[[Any], Method]
    summary: str
    method: type[Method]


METHODS: dict[str, Registered] = {}


def register(name: str, config: type, method: type[Method], summary: str) -> None:
    """Called at the bottom of a method's own file."""
    if name != name.lower() or name in METHODS:
        raise ConceptError(f"method name {name!r} must be lower case and new; taken: {', '.join(sorted(METHODS))}")
    method.name = name
    METHODS[name] = Registered(name, config, method, summary, method)


def get(name: str) -> Registered:
    if name not in METHODS:
        raise ConceptError(f"unknown method {name!r}; known: {', '.join(sorted(METHODS))}")
    return METHODS[name]


def make(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """A method with its settings; unknown settings are refused by name."""
    entry = get(name)
    known = {f.name for f in fields(entry.config)}
    unknown = sorted(set(settings or {}) - known)
    if unknown:
        raise ConceptError(f"method '{name}' has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return entry.build(entry.config(**(settings or {})))

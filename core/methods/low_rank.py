"""Settings and life of a task that all low-rank methods share: words, and deltas of one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..attention.adapters import LowRankAdapters
from ..model.deltas import Deltas
from ..model.sites import PROJECTIONS
from ..settings import one_of, setting
from .base import Method, MethodConfig

KEYS_AND_VALUES = ("to_k", "to_v")
_LETTERS = dict(zip("qkvo", PROJECTIONS, strict=True))


@dataclass(frozen=True)
class RankConfig(MethodConfig):
    rank: int = setting(4, "Rank of the deltas. A higher rank holds more detail and makes the concept "
                           "larger.", 1, 128)
    scale = 1.0      # factor on the deltas; no field, because the merge of some methods fixes it


@dataclass(frozen=True)
class LowRankConfig(RankConfig):
    scale: float = setting(1.0, "Factor on the deltas; 1 = unchanged.", 0.01, 16.0, 0.05)


def projections_of(letters: str) -> tuple[str, ...]:
    """The projections that a setting such as `qo` names."""
    return tuple(_LETTERS[letter] for letter in letters)


@dataclass(frozen=True)
class ProjectionsConfig(LowRankConfig):
    """projections: the adapted ones, for ablations: qkvo, qvo, kv or v."""

    projections: str = "qkvo"

    limits = {"projections": one_of(("qkvo", "qvo", "kv", "v"))}


class LowRankMethod(Method):
    """Trains words and low-rank deltas of `projections` at every site."""

    projections: ClassVar[Sequence[str]] = PROJECTIONS
    config: RankConfig
    adapters: LowRankAdapters

    def make_adapters(self) -> LowRankAdapters:
        c, backbone, generator = self.config, self.task.backbone, self.task.generator
        chosen = projections_of(c.projections) if isinstance(c, ProjectionsConfig) else self.projections
        return LowRankAdapters(backbone.layout, c.rank, c.scale, generator, backbone.device, chosen)

    def by_activation(self) -> tuple[Deltas, Deltas]:
        """The deltas that act through the concept's words alone, and all others."""
        deltas, composition = self.adapters.deltas(), self.composition_of_kind(self.task.kind)
        word_bound = {key: delta for key, delta in deltas.items() if composition.is_word_bound(key[1])}
        return word_bound, {key: delta for key, delta in deltas.items() if key not in word_bound}

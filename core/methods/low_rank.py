"""Settings and life of a task that all low-rank methods share: words, and deltas of one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..attention.adapters import LowRankAdapters
from ..model.sites import PROJECTIONS
from ..settings import one_of, setting
from .base import Method, MethodConfig

KEYS_AND_VALUES = ("to_k", "to_v")
LETTERS = {"qkvo": PROJECTIONS, "qvo": ("to_q", "to_v", "to_out"), "kv": KEYS_AND_VALUES, "v": ("to_v",),
           "qo": ("to_q", "to_out")}


@dataclass(frozen=True)
class RankConfig(MethodConfig):
    rank: int = setting(4, "Rank of the deltas. A higher rank holds more detail and makes the concept "
                           "larger.", 1, 128)
    scale = 1.0      # factor on the deltas; no field, because the merge of some methods fixes it


@dataclass(frozen=True)
class LowRankConfig(RankConfig):
    scale: float = setting(1.0, "Factor on the deltas; 1 = none.", 0.01, 16.0, 0.05)


@dataclass(frozen=True)
class ProjectionsConfig(LowRankConfig):
    """projections: the adapted ones, for ablations: qkvo, qvo, kv or v."""

    projections: str = "qkvo"

    limits = {"projections": one_of(tuple(letters for letters in LETTERS if letters != "qo"))}


class LowRankMethod(Method):
    """Trains words and low-rank deltas of `projections` at every site."""

    projections: ClassVar[Sequence[str]] = PROJECTIONS
    config: RankConfig
    adapters: LowRankAdapters

    def make_adapters(self) -> LowRankAdapters:
        c, backbone, generator = self.config, self.task.backbone, self.task.generator
        chosen = LETTERS[c.projections] if isinstance(c, ProjectionsConfig) else self.projections
        return LowRankAdapters(backbone.layout, c.rank, c.scale, generator, backbone.device, chosen)

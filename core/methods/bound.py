"""Word-bound concepts: layer-wise words, and low-rank deltas that act only through those words. Ours.

Layer-wise tokens and rank-4 deltas on q, k, v, out of every site are trained, as in CIDM. CIDM's deltas
change every position of a prompt that names the concept. Two concepts in one prompt then change each other,
and each has learned to rely on the changed keys and values of all other words. Here a delta acts at the
positions of its own words, in training and in sampling (attention.token_lora has the formula), and the words
are encoded apart from the rest of the prompt (conditioning.placeholder_nouns). No penalty, shared state or
order of tasks is needed, and a step costs the same for any bank.

Related work: Mix-of-Show and CIDM bind region prompts to boxes. Perfusion gates rank-one updates of k and v
by similarity to the concept's text state and leaves to_q and to_out alone. We know of no other method that
binds all four projections to the words in one attention call.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..attention.token_lora import TokenLoraProcessor
from ..bank.composition import WORDS, Composition, Kind
from ..model.processor import AttentionProcessor
from ..settings import one_of, setting
from .base import Task, register
from .low_rank import LowRankMethod, ProjectionsConfig, projections_of


@dataclass(frozen=True)
class BoundConfig(ProjectionsConfig):
    """free: projections whose deltas are prompt-activated all the same, for ablations: qo, kv or qkvo."""

    apart: bool = setting(True, "Encode the words apart from the rest of the prompt, so that several "
                                "concepts mix less.")
    free: str = ""

    limits = {**ProjectionsConfig.limits, "free": one_of(("", "qo", "kv", "qkvo"))}


@register("bound", BoundConfig, "layer-wise words, and low-rank deltas that act through these words only, so "
          "that concepts stay distinct")
class Bound(LowRankMethod):
    composition = WORDS
    refinable = True
    config: BoundConfig

    def begin(self, task: Task) -> None:
        super().begin(task)
        self.words.placeholder_noun = task.class_noun if self.config.apart else ""

    def composition_of_kind(self, kind: str) -> Composition:
        return Composition(Kind.WORDS, free=projections_of(self.config.free))

    def processor(self) -> AttentionProcessor:
        word_bound, free = self.by_activation()
        return TokenLoraProcessor({self.task.name: word_bound}, free)

"""Word-bound concepts: layer-wise words, and low-rank deltas that act only through those words. Ours, and the
default.

Layer-wise tokens and rank-4 deltas on q, k, v, out of every site are trained, as in CIDM. CIDM's deltas
change every position of a prompt that names the concept. Two concepts in one prompt then change each other,
and each has learned to rely on the changed keys and values of all other words. Here a delta belongs to the
positions of its own words, in training and in sampling (attention.token_lora has the formula).

The words are encoded apart from the rest of the prompt (conditioning.encoding). All other tokens are encoded
with the class noun in the words' place, and one concept's words with the class nouns of the others. Naming a
concept therefore changes the sites at its own words' positions and nothing else. No penalty, shared state or
order of tasks is needed, and a step costs the same for any bank.

Related work: Mix-of-Show and CIDM bind region prompts to boxes. Perfusion gates rank-one updates of k and v
by similarity to the concept's text state and leaves to_q and to_out alone. We know of no other method that
binds all four projections to the words in one attention call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..attention.token_lora import TokenLoraProcessor
from ..bank.composition import WORDS
from ..bank.tokens import TokenGroup
from ..model.processor import AttentionProcessor
from ..settings import setting
from .base import Outcome, register
from .low_rank import LowRankConfig, LowRankMethod


@dataclass(frozen=True)
class BoundConfig(LowRankConfig):
    """The settings of low-rank methods, and how the words are encoded."""

    apart: bool = setting(True, "Encode the words apart from the rest of the prompt, so that several "
                                "concepts mix less.")


class Bound(LowRankMethod):
    composition = WORDS
    config: BoundConfig

    def token_group(self) -> TokenGroup:
        return self._apart(super().token_group())

    def _apart(self, tokens: TokenGroup) -> TokenGroup:
        return replace(tokens, placeholder_noun=self.task.class_noun if self.config.apart else "")

    def processor(self) -> AttentionProcessor:
        deltas = {key: self.adapters.delta(key) for key in self.adapters.keys}
        return TokenLoraProcessor({self.task.name: deltas})

    @torch.no_grad()
    def finish(self) -> Outcome:
        outcome = super().finish()
        return replace(outcome, tokens=self._apart(outcome.tokens))


register("bound", BoundConfig, Bound,
         "layer-wise words, and low-rank deltas that act through those words alone: concepts cannot touch "
         "each other")

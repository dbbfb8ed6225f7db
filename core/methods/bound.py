"""Word-bound concepts: layer-wise words and low-rank deltas that act through those words alone. Ours, and the default.

Trained: layer-wise tokens and rank-4 deltas on q, k, v, out of every site, as CIDM's; what differs is where they act. CIDM's deltas
change every position of a prompt that names the concept: two concepts in one prompt change each other, and each was trained to lean on
the changed keys and values of all other words. Here a delta belongs to the positions of its own words (core.bound has the formula), in
training as in sampling. The words themselves are encoded apart (see core.encoding): all other tokens of a prompt are encoded with the class
noun in the words' place, and one concept's words with the class nouns of the others. So naming a concept changes its own words' positions
at the sites and nothing else, two dogs in one prompt stay two dogs, and there is nothing to consolidate: no penalty, no shared state, no
order of tasks, and the cost of a step does not depend on the bank.

Differs from what is known: Mix-of-Show and CIDM bind region prompts to boxes; Perfusion gates rank-one updates of k and v by likeness with
the concept's text state and keeps to_q and to_out. We know of nobody who binds all four projections to the words in one attention call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..attention.token_lora import TokenLoraProcessor
from ..bank.composition import WORDS
from ..bank.tokens import TokenGroup
from ..model.backbone import AttentionProcessor
from ..settings import setting
from .base import Outcome, register
from .low_rank import LowRankConfig, LowRankMethod


@dataclass(frozen=True)
class BoundConfig(LowRankConfig):
    """The settings of low-rank methods, and how the words are encoded."""

    apart: bool = setting(True, "Encode the words apart from the rest of the prompt, so that several concepts mix less.")


class Bound(LowRankMethod):
    composition = WORDS

    def token_group(self) -> TokenGroup:
        return replace(super().token_group(), placeholder_noun=self._stand_in())

    def _stand_in(self) -> str:
        return self.task.class_noun if self.config.apart else ""

    def processor(self) -> AttentionProcessor:
        return TokenLoraProcessor({self.task.name: {key: self.adapters.delta(*key) for key in self.adapters.keys}})

    def finish(self) -> Outcome:
        outcome = super().finish()
        return replace(outcome, tokens=replace(outcome.tokens, placeholder_noun=self._stand_in()))


register("bound", BoundConfig, Bound,
         "layer-wise words, and low-rank deltas that act through those words alone: concepts cannot touch each other")

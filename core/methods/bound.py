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

from torch import nn

from ..bound import BoundProgram
from ..hosts.backbone import SiteProgram
from ..tokens import TokenGroup
from .base import LearnedWords, LowRankAdapters, Method, Outcome, Task, register, require, stored_dtype


@dataclass(frozen=True)
class BoundConfig:
    """rank: of all four deltas; apart: encode the words apart from the rest of the prompt; lr, token_lr: of deltas and words; layerwise:
    one vector per word and layer copy, else one per word; first_std: spread of the first word's start, 0 = that of the vocabulary;
    stored: type of the bank's tensors."""

    rank: int = 4
    scale: float = 1.0
    lr: float = 1e-4
    token_lr: float = 1e-3
    layerwise: bool = True
    apart: bool = True
    first_std: float = 0.0
    stored: str = "float16"

    def __post_init__(self) -> None:
        require(1 <= self.rank <= 128, "rank", self.rank, "1 to 128")
        for name in ("lr", "token_lr", "first_std"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        stored_dtype(self.stored)


class Bound(Method):
    composition = "bound"

    def __init__(self, config: BoundConfig) -> None:
        self.config = config

    def begin(self, task: Task) -> None:
        c, self.task = self.config, task
        self.words = LearnedWords(task, c.layerwise, c.first_std)
        self.adapters = LowRankAdapters(task.backbone.layout, c.rank, c.scale, task.generator, task.backbone.device)

    def parameter_groups(self) -> list[dict]:
        return [{"params": list(self.words.parameters()), "lr": self.config.token_lr},
                {"params": list(self.adapters.parameters()), "lr": self.config.lr}]

    def token_group(self) -> TokenGroup:
        return replace(self.words.group(), stand_in=self._stand_in())

    def _stand_in(self) -> str:
        return self.task.class_noun if self.config.apart else ""

    def program(self) -> SiteProgram:
        return BoundProgram({self.task.name: {key: self.adapters.delta(*key) for key in self.adapters.keys}})

    def finish(self) -> Outcome:
        dtype = stored_dtype(self.config.stored)
        words = replace(self.words.stored(dtype), stand_in=self._stand_in())
        return Outcome(words, self.adapters.stored(dtype))

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"words": self.words, "adapters": self.adapters})


register("bound", BoundConfig, Bound,
         "layer-wise words, and low-rank deltas that act through those words alone: concepts cannot touch each other")

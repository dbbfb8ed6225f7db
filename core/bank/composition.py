"""How the concepts of a bank act together in one picture. Every method says it for its concepts, and every concept carries it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import Enum

from ..errors import ConceptError


class Kind(str, Enum):
    """PROMPT: the deltas act when the prompt names the concept. WORDS: they act then, and through the concept's own words alone
    (word-bound). SUM: the deltas of all concepts are one set of weights, always on. AVERAGE: the predictions of one model for each
    concept are averaged, always on."""

    PROMPT = "route"
    WORDS = "bound"
    SUM = "sum"
    AVERAGE = "average"


@dataclass(frozen=True)
class Composition:
    """kind: see Kind. merged: the factor on each concept's deltas as soon as there are several; None: one over their number."""

    kind: Kind = Kind.PROMPT
    merged: float | None = 1.0

    def share(self, concepts: int) -> float:
        """The factor on each concept's deltas where that many concepts of its method are in the bank."""
        if concepts <= 1:
            return 1.0
        return 1.0 / concepts if self.merged is None else self.merged

    @property
    def is_always_on(self) -> bool:
        return self.kind in (Kind.SUM, Kind.AVERAGE)

    def to_json(self) -> dict:
        return {**asdict(self), "kind": self.kind.value}

    @classmethod
    def from_json(cls, data: object) -> Composition:
        """Reads what `to_json` wrote. Raises ConceptError for anything else."""
        kind, merged = (data.get("kind"), data.get("merged")) if isinstance(data, dict) else (data, None)
        is_number = isinstance(merged, (int, float)) and not isinstance(merged, bool) and math.isfinite(merged)
        if kind not in [known.value for known in Kind] or not (merged is None or is_number):
            kinds = ", ".join(known.value for known in Kind)
            raise ConceptError(f"composition is {str(data)[:80]!r}; allowed: kind {kinds}; merged a number or null")
        return cls(Kind(kind), merged)


PROMPT, WORDS, SUM, AVERAGE = (Composition(kind) for kind in Kind)

# The first version of the project did not write the composition into its files. These were its methods; this list does not grow.
_UNWRITTEN = {
    "bound": WORDS, "clora": SUM, "cns": SUM, "scns": SUM, "custom_diffusion": SUM, "custom_diffusion_merge": SUM, "ewc": SUM,
    "finetune": SUM, "l2dm": SUM, "lwf": SUM, "mix_of_show": SUM, "stamina": SUM,
    "lora_m": Composition(Kind.SUM, None), "lora_c": Composition(Kind.AVERAGE, None), "orthogonal_adaptation": Composition(Kind.SUM, 0.6),
}


def unwritten(method: str) -> Composition:
    """The composition of a concept whose file does not say it. Concepts of an unknown method are prompt-activated."""
    return _UNWRITTEN.get(str(method), PROMPT)

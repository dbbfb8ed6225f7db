"""How the concepts of a bank act together in one picture. A method defines this; each concept stores it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import Enum

from ..errors import ConceptError
from ..model.sites import PROJECTIONS


class Kind(str, Enum):
    """When a concept's deltas act.

    PROMPT: When the prompt names the concept (prompt-activated).
    WORDS: When the prompt names it, and through the concept's own words alone (word-bound).
    SUM: Always; the deltas of all concepts are one set of weights.
    AVERAGE: Always; the predictions of one model for each concept are averaged.
    """

    PROMPT = "route"
    WORDS = "bound"
    SUM = "sum"
    AVERAGE = "average"


@dataclass(frozen=True)
class Composition:
    """How concepts of a method come together.

    Args:
        kind: When the deltas act.
        merged: For always-on concepts: factor on each concept's deltas if there are several. None = 1 /
            number of concepts.
        free: For word-bound concepts: the projections whose deltas are prompt-activated all the same.
    """

    kind: Kind = Kind.PROMPT
    merged: float | None = 1.0
    free: tuple[str, ...] = ()

    @property
    def acts_on_all_words(self) -> bool:
        """Whether deltas act on all words of a prompt because it names the concept: all of them, or those of
        the `free` projections.
        """
        return self.kind is Kind.PROMPT or (self.kind is Kind.WORDS and bool(self.free))

    def is_word_bound(self, projection: str) -> bool:
        """Whether the deltas of a projection act through the concept's own words alone."""
        return self.kind is Kind.WORDS and projection not in self.free

    def share(self, count: int) -> float:
        """Factor on each concept's deltas if the bank has `count` concepts of its method."""
        if count <= 1:
            return 1.0
        return 1.0 / count if self.merged is None else self.merged

    def to_json(self) -> dict:
        data = {**asdict(self), "kind": self.kind.value}
        if not self.free:      # files without this field are written without it again
            del data["free"]
        return data

    @classmethod
    def from_json(cls, data: object) -> Composition:
        """Reads what `to_json` wrote; further keys of a newer version are ignored.

        Raises:
            ConceptError: The data is anything else.
        """
        if isinstance(data, dict):
            kind, merged, free = data.get("kind"), data.get("merged", 1.0), data.get("free", [])
            if (kind in [member.value for member in Kind] and (merged is None or _is_finite(merged))
                    and isinstance(free, (list, tuple)) and all(name in PROJECTIONS for name in free)):
                return cls(Kind(kind), merged, tuple(free))
        kinds = ", ".join(member.value for member in Kind)
        raise ConceptError(f"composition is {str(data)[:80]!r}; allowed: kind {kinds}; merged a finite "
                           f"number or null; free a list of {', '.join(PROJECTIONS)}")


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:      # an integer too large for a float
        return False


PROMPT = Composition(Kind.PROMPT)
WORDS = Composition(Kind.WORDS)
SUM = Composition(Kind.SUM)
AVERAGE = Composition(Kind.AVERAGE)

# Bank files of the first version do not store the composition. These were its methods; the list is final.
_OLDER_METHODS = {
    "bound": WORDS, "clora": SUM, "cns": SUM, "scns": SUM, "custom_diffusion": SUM,
    "custom_diffusion_merge": SUM, "ewc": SUM, "finetune": SUM, "l2dm": SUM, "lwf": SUM, "mix_of_show": SUM,
    "stamina": SUM,
    "lora_m": Composition(Kind.SUM, None), "lora_c": Composition(Kind.AVERAGE, None),
    "orthogonal_adaptation": Composition(Kind.SUM, 0.6),
}


def of_older_file(method: str) -> Composition:
    """The composition of a concept from a file that does not store it. Unknown methods are prompt-activated.
    """
    return _OLDER_METHODS.get(str(method), PROMPT)

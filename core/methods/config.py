"""Settings of methods: what all of them have, and how the fields are checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from ..errors import ConceptError
from ..model.storage import stored_dtype

Limit = tuple[Callable[[Any], bool], str]      # whether a value is allowed, and what is, in words


def at_least(low: float) -> Limit:
    return lambda value: value >= low, f"{low} or more"


def between(low: float, high: float) -> Limit:
    return lambda value: low <= value <= high, f"{low} to {high}"


def above(low: float, high: float = float("inf")) -> Limit:
    """Greater than `low`, at most `high`."""
    return lambda value: low < value <= high, f"above {low}" + (f" to {high}" if high < float("inf") else "")


def one_of(choices: tuple[str, ...]) -> Limit:
    return lambda value: value in choices, ", ".join(choices)


RANK, NOT_NEGATIVE, SHARE = between(1, 128), at_least(0), above(0, 1)
_COMMON = {"rank": RANK, "lr": NOT_NEGATIVE, "token_lr": NOT_NEGATIVE, "first_std": NOT_NEGATIVE}


class MethodConfig:
    """Base of all methods' settings, which are frozen dataclasses with their own order of fields.

    lr, token_lr: learning rates of deltas and words; layerwise: one vector per word and layer copy, else one
    per word; first_std: spread of the first word's start, 0 = that of the vocabulary; stored: type of the
    bank's tensors. limits: allowed values of a method's own fields. """

    lr: float
    token_lr: float
    layerwise: bool
    first_std: float
    stored: str
    limits: ClassVar[Mapping[str, Limit]] = {}

    def __post_init__(self) -> None:
        for name, (allows, allowed) in {**_COMMON, **self.limits}.items():
            if hasattr(self, name):
                require(allows(getattr(self, name)), name, getattr(self, name), allowed)
        stored_dtype(self.stored)


class RankConfig(MethodConfig):
    """Settings of methods with low-rank deltas. rank: of every delta; scale: factor on them."""

    rank: int
    scale: float = 1.0


def require(condition: bool, setting: str, value: object, allowed: str) -> None:
    """Raises ConceptError for a setting that is not allowed."""
    if not condition:
        raise ConceptError(f"setting '{setting}' is {value!r}; allowed: {allowed}")

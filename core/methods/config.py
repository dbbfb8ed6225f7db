"""Settings of methods: what all of them have, and how the fields are checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..model.storage import stored_dtype
from ..settings import Limit, above, at_least, between, check

RANK, NOT_NEGATIVE, SHARE = between(1, 128), at_least(0), above(0, 1)
_COMMON = {"rank": RANK, "lr": NOT_NEGATIVE, "token_lr": NOT_NEGATIVE, "first_std": NOT_NEGATIVE}


class MethodConfig:
    """Base of all methods' settings, which are frozen dataclasses with their own order of fields.

    lr, token_lr: learning rates of deltas and words; layerwise: one vector per word and layer copy, else one
    per word; first_std: spread of the first word's start, 0 = that of the vocabulary; stored: type of the
    bank's tensors. limits: allowed values of a method's own fields.
    """

    lr: float
    token_lr: float
    layerwise: bool
    first_std: float
    stored: str
    limits: ClassVar[Mapping[str, Limit]] = {}

    def __post_init__(self) -> None:
        check(self, {**_COMMON, **self.limits})
        stored_dtype(self.stored)


class RankConfig(MethodConfig):
    """Settings of methods with low-rank deltas. rank: of every delta; scale: factor on them."""

    rank: int
    scale: float = 1.0

"""Settings of methods: what all of them have, and how the fields are checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..model.storage import stored_dtype
from ..settings import Limit, above, at_least, between, check, setting

RANK, NOT_NEGATIVE, SHARE = between(1, 128), at_least(0), above(0, 1)
_COMMON = {"rank": RANK, "lr": NOT_NEGATIVE, "token_lr": NOT_NEGATIVE, "first_std": NOT_NEGATIVE}


@dataclass(frozen=True)
class MethodConfig:
    """Settings of every method. A method's own class adds fields and replaces defaults.

    lr, token_lr: learning rates of deltas and words; layerwise: one vector per word and layer copy, else one
    per word; first_std: spread of the first word's start, 0 = that of the vocabulary; stored: type of the
    bank's tensors. limits: allowed values of a method's own fields.
    """

    lr: float = 1e-4
    token_lr: float = 1e-3
    layerwise: bool = setting(True, "One vector per word and layer, or one for all layers, which exports as "
                                    "an embedding.")
    first_std: float = 0.0
    stored: str = "float16"
    limits: ClassVar[Mapping[str, Limit]] = {}

    def __post_init__(self) -> None:
        check(self, {**_COMMON, **self.limits})
        stored_dtype(self.stored)

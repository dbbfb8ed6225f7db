"""Settings of methods: what all of them have, and how the fields are checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

from ..model.storage import stored_dtype
from ..settings import Limit, above, at_least, between, check, setting

RANK, SHARE = between(1, 128), above(0, 1)


@dataclass(frozen=True)
class MethodConfig:
    """Settings of every method. A method's own class adds fields and replaces defaults.

    lr, token_lr: learning rates of deltas and words; layerwise: one vector per word and layer copy, else one
    per word; first_std: spread of the first word's start, 0 = that of the vocabulary; stored: type of the
    bank's tensors. limits: allowed values of fields; numbers that it does not list are 0 or more.
    """

    lr: float = setting(1e-4, "Learning rate of the deltas.", 1e-6, 2e-2)
    token_lr: float = setting(1e-3, "Learning rate of the words.", 1e-6, 0.2)
    layerwise: bool = setting(True, "One vector per word and layer, or one for all layers, which exports as "
                                    "an embedding.")
    first_std: float = 0.0
    stored: str = "float16"
    limits: ClassVar[Mapping[str, Limit]] = {}

    def __post_init__(self) -> None:
        numbers = {f.name: at_least(0) for f in fields(self) if type(f.default) in (int, float)}
        check(self, {**numbers, "rank": RANK, **self.limits})
        stored_dtype(self.stored)

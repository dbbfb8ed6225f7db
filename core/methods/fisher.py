"""The running Fisher information of all old tasks, after Schwarz et al. (ICML 2018), "online EWC"."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

Key = TypeVar("Key")


def running_fisher(old: Mapping[Key, Tensor], new: Mapping[Key, Tensor], decay: float) -> dict[Key, Tensor]:
    """`F <- decay F + F_t`, with F_t normalised to mean 1 over all entries, so that no task counts more for
    its size.

    Args:
        old: F, empty after the first task.
        new: squared gradients of this task, not normalised. Without any, or with infinite ones, F stays as it
            is.
        decay: 1 = old tasks never fade.
    """
    total = sum(float(squares.sum()) for squares in new.values())
    if total == 0 or not math.isfinite(total):
        return dict(old)
    share = sum(squares.numel() for squares in new.values()) / total
    running = {key: decay * fisher for key, fisher in old.items()}
    for key, squares in new.items():
        running[key] = squares * share + running[key] if key in running else squares * share
    return running

"""The running Fisher information of all old tasks, after Schwarz et al. (ICML 2018), "online EWC"."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_PREFIX = "fisher."


def stored_fisher(state: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """F by parameter, from shared state that `running_fisher` returned; empty before the first task."""
    return {name.removeprefix(_PREFIX): f.to(device, torch.float32) for name, f in state.items()
            if name.startswith(_PREFIX)}


def running_fisher(old: Mapping[str, Tensor], new: Mapping[str, Tensor], decay: float) -> dict[str, Tensor]:
    """`F <- decay F + F_t` for shared state, with F_t normalised to mean 1 over all entries, so that no task
    counts more for its size.

    Args:
        old: F, empty after the first task.
        new: squared gradients of this task, not normalised. Without any, or with infinite ones, F stays as it
            is.
        decay: 1 = old tasks never fade.
    """
    total = sum(float(squares.sum()) for squares in new.values())
    running = dict(old)
    if total > 0 and math.isfinite(total):
        share = sum(squares.numel() for squares in new.values()) / total
        running = {name: decay * fisher for name, fisher in old.items()}
        for name, squares in new.items():
            running[name] = squares * share + running.get(name, 0)
    return {_PREFIX + name: fisher.cpu().clone() for name, fisher in running.items()}

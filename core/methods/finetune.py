"""Sequential finetuning: one set of low-rank factors is trained on, task after task. The first baseline.

The CIDM paper compares with "Finetuning" without saying which weights move. Our reading has CIDM's capacity
(tokens, and q, k, v, out of every site at one rank) and nothing against forgetting. The record of task t is
what it added: the new product minus the old one, exact at rank 2r. Composition is the sum of all tasks'
deltas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.adapters import AdapterProcessor, adapter_key
from ..bank.composition import SUM
from ..model.deltas import DeltaKey, Deltas, LowRankDelta
from ..model.processor import AttentionProcessor
from ..model.storage import stored_deltas
from .base import Task, register
from .low_rank import LowRankConfig, LowRankMethod


@register("finetune", LowRankConfig,
          "sequential finetuning of one low-rank adapter; the baseline that forgets")
class Finetune(LowRankMethod):
    """undone: minus the deltas that training starts at, by projection; empty in the first task."""

    composition = SUM

    def begin(self, task: Task) -> None:
        super().begin(task)
        self.undone: dict[DeltaKey, LowRankDelta] = {}
        state = task.bank.shared.get(self.name, {})
        for key in self.adapters.keys:
            (up, down), name = self.adapters.delta(key).tensors(), adapter_key(*key)
            if f"{name}.up" in state and state[f"{name}.up"].shape == up.shape:
                with torch.no_grad():
                    up.copy_(state[f"{name}.up"])
                    down.copy_(state[f"{name}.down"])
                self.undone[key] = LowRankDelta(-up.detach(), down.detach().clone(), self.config.scale)

    def processor(self) -> AttentionProcessor:
        return AdapterProcessor(self.adapters, self)

    def change(self, key: DeltaKey, x: Tensor) -> Tensor | None:
        """Takes away what training starts at, since the old sum is folded into the weights."""
        return self.undone[key].apply(x) if key in self.undone else None

    def recorded(self, dtype: torch.dtype) -> Deltas:
        return stored_deltas({key: delta.beside(self.undone[key]) if self.undone else delta
                              for key, delta in self.adapters.deltas().items()}, dtype)

    def shared_state(self) -> dict[str, Tensor]:
        return {f"{adapter_key(*key)}.{factor}": getattr(delta, factor).detach().cpu().clone()
                for key, delta in self.adapters.deltas().items() for factor in ("up", "down")}

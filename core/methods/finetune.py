"""Sequential finetuning: one set of low-rank factors is trained on, task after task. The first baseline.

The CIDM paper compares with "Finetuning" without saying which weights move. Our reading has CIDM's capacity
(tokens, and q, k, v, out of every site at one rank) and nothing against forgetting. The record of task t is
what it added: the new product minus the old one, exact at rank 2r. Composition is the sum of all tasks'
deltas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.adapters import AdapterProcessor, LowRankAdapters, adapter_key
from ..bank.composition import SUM
from ..model.deltas import DeltaKey, Deltas, LowRankDelta
from ..model.processor import AttentionProcessor
from ..model.sites import Site
from ..model.storage import stored_deltas
from .base import Task, register
from .low_rank import LowRankConfig, LowRankMethod


class ContinuedProcessor(AdapterProcessor):
    """Adds the difference to where training started, since the old sum is folded into the weights."""

    def __init__(self, adapters: LowRankAdapters, start: dict[DeltaKey, LowRankDelta]) -> None:
        super().__init__(adapters)
        self.start = start

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        changed = super().project(site, projection, x, y)
        before = self.start.get((site.index, projection))
        return changed if before is None else changed - before.apply(x).to(y.dtype)


class Finetune(LowRankMethod):
    """start: the deltas that training starts at, by projection; empty in the first task."""

    composition = SUM

    def begin(self, task: Task) -> None:
        super().begin(task)
        self.start: dict[DeltaKey, LowRankDelta] = {}
        state = task.bank.shared.get(self.name, {})
        for key in self.adapters.keys:
            (up, down), name = self.adapters.delta(key).tensors(), adapter_key(*key)
            if f"{name}.up" in state and state[f"{name}.up"].shape == up.shape:
                with torch.no_grad():
                    up.copy_(state[f"{name}.up"])
                    down.copy_(state[f"{name}.down"])
                self.start[key] = LowRankDelta(up.detach().clone(), down.detach().clone(), self.config.scale)

    def processor(self) -> AttentionProcessor:
        return ContinuedProcessor(self.adapters, self.start)

    def recorded(self, dtype: torch.dtype) -> Deltas:
        return stored_deltas({key: self._added(key) for key in self.adapters.keys}, dtype)

    def _added(self, key: DeltaKey) -> LowRankDelta:
        up, down = (factor.detach().cpu() for factor in self.adapters.delta(key).tensors())
        if self.start:
            before = self.start[key]
            up, down = torch.cat([up, -before.up.cpu()], dim=1), torch.cat([down, before.down.cpu()], dim=0)
        return LowRankDelta(up, down, self.config.scale)

    def shared_state(self) -> dict[str, Tensor]:
        return {f"{adapter_key(*key)}.{factor}": tensor.detach().cpu().clone() for key in self.adapters.keys
                for factor, tensor in zip(("up", "down"), self.adapters.delta(key).tensors(), strict=True)}


register("finetune", LowRankConfig, Finetune,
         "sequential finetuning of one low-rank adapter; the baseline that forgets")

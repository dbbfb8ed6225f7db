"""Sequential finetuning: one set of low-rank factors trained on and on, task after task. The first baseline.

The CIDM paper compares with "Finetuning" without saying which weights move; this is our reading, the same capacity as CIDM's
(tokens, and q, k, v, out of every site at one rank) with nothing against forgetting. The concept recorded for task t is what task t
added: the new product minus the old one, exact at rank 2r. Composition is the sum of all tasks' deltas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..bank.composition import SUM
from ..bank.tokens import TokenGroup
from ..model.backbone import AttentionProcessor
from ..model.deltas import DeltaKey, LowRankDelta
from .base import AdapterProcessor, LearnedWords, LowRankAdapters, Method, Outcome, Task, adapter_key, kept_deltas, register, stored_dtype
from .low_rank import LowRankConfig


@dataclass(frozen=True)
class FinetuneConfig(LowRankConfig):
    """Settings as CIDM's, so that a comparison differs in the method alone."""


class _Continued(AdapterProcessor):
    """Inside the loop the old sum is folded into the weights; what is trained is the difference to where it started."""

    def __init__(self, adapters: LowRankAdapters, start: dict[DeltaKey, LowRankDelta]) -> None:
        super().__init__(adapters)
        self.start = start

    def project(self, site, projection, x, y):
        changed = super().project(site, projection, x, y)
        before = self.start.get((site.index, projection))
        return changed if before is None else changed - before.apply(x).to(y.dtype)


class Finetune(Method):
    composition = SUM

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config

    def begin(self, task: Task) -> None:
        c, layout, device = self.config, task.backbone.layout, task.backbone.device
        self.words = LearnedWords(task, c.layerwise, c.first_std)
        self.adapters = LowRankAdapters(layout, c.rank, c.scale, task.generator, device)
        self.start: dict[DeltaKey, LowRankDelta] = {}
        state = task.bank.shared.get(self.name, {})
        for key in self.adapters.keys:
            name = adapter_key(*key)
            if f"{name}.up" in state and state[f"{name}.up"].shape == self.adapters.up[name].shape:
                with torch.no_grad():
                    self.adapters.up[name].copy_(state[f"{name}.up"])
                    self.adapters.down[name].copy_(state[f"{name}.down"])
                self.start[key] = LowRankDelta(self.adapters.up[name].detach().clone(), self.adapters.down[name].detach().clone(), c.scale)

    def parameter_groups(self) -> list[dict]:
        return [{"params": list(self.words.parameters()), "lr": self.config.token_lr},
                {"params": list(self.adapters.parameters()), "lr": self.config.lr}]

    def token_group(self) -> TokenGroup:
        return self.words.group()

    def processor(self) -> AttentionProcessor:
        return _Continued(self.adapters, self.start)

    def finish(self) -> Outcome:
        dtype, deltas = stored_dtype(self.config.stored), {}
        for key in self.adapters.keys:
            new = self.adapters.delta(*key)
            up, down = new.up.detach().cpu(), new.down.detach().cpu()
            if self.start:
                before = self.start[key]
                up, down = torch.cat([up, -before.up.cpu()], dim=1), torch.cat([down, before.down.cpu()], dim=0)
            deltas[key] = LowRankDelta(up, down, self.config.scale)
        shared = {}
        for key in self.adapters.keys:
            name = adapter_key(*key)
            shared[f"{name}.up"] = self.adapters.up[name].detach().cpu().clone()
            shared[f"{name}.down"] = self.adapters.down[name].detach().cpu().clone()
        return Outcome(self.words.stored(dtype), kept_deltas(deltas, dtype), shared)

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"words": self.words, "adapters": self.adapters})


register("finetune", FinetuneConfig, Finetune, "sequential finetuning of one low-rank adapter; the baseline that forgets")

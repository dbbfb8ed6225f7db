"""A toy: rank-1 changes of the values whose input direction stays fixed, kept small from the second task on.

This is a complete method. test_one_file.py loads it, counts its lines and uses it in every way in which
concepts compose. """

from __future__ import annotations

from dataclasses import dataclass

import torch

from continual_concepts.core.attention.token_lora import TokenLoraProcessor
from continual_concepts.core.bank.composition import Kind
from continual_concepts.core.methods.base import register
from continual_concepts.core.methods.low_rank import LowRankConfig, LowRankMethod


@dataclass(frozen=True)
class ToyConfig(LowRankConfig):
    """tie: weight of `sum ||A_t||^2`."""

    rank: int = 1
    layerwise: bool = False
    tie: float = 1e-3


@register("toy", ToyConfig, "a toy")
class Toy(LowRankMethod):
    word_count = 1
    projections = ("to_v",)
    config: ToyConfig

    def begin(self, task):
        super().begin(task)
        self.adapters.down.requires_grad_(False)

    def processor(self):
        if self.composition.kind is not Kind.WORDS:
            return super().processor()
        return TokenLoraProcessor({self.task.name: self.adapters.deltas()})

    def penalty(self, seen):
        ups = [self.adapters.delta(key).up for key in self.adapters.keys]
        return {"toy": self.config.tie * sum(up.square().sum() for up in ups)} if len(self.task.bank) else {}

    def shared_state(self):
        return {"tasks": torch.tensor(float(len(self.task.bank) + 1))}

"""What the methods share that train words and low-rank deltas of one rank: settings and life of a task."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..bank.tokens import TokenGroup
from ..model.backbone import AttentionProcessor
from .base import AdapterProcessor, LearnedWords, LowRankAdapters, Method, Outcome, Task, require, stored_dtype


@dataclass(frozen=True)
class LowRankConfig:
    """rank, scale: of the deltas; lr, token_lr: of deltas and words; layerwise: one vector per word and layer copy, else one per word;
    first_std: spread of the first word's start, 0 = that of the vocabulary; stored: type of the bank's tensors."""

    rank: int = 4
    scale: float = 1.0
    lr: float = 1e-4
    token_lr: float = 1e-3
    layerwise: bool = True
    first_std: float = 0.0
    stored: str = "float16"

    def __post_init__(self) -> None:
        require(1 <= self.rank <= 128, "rank", self.rank, "1 to 128")
        for name in ("lr", "token_lr", "first_std"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        stored_dtype(self.stored)


class LowRankMethod(Method):
    """Words and adapters on q, k, v, out of every site, nothing else. What a method does beside that, it overrides."""

    def __init__(self, config: LowRankConfig) -> None:
        self.config = config

    def begin(self, task: Task) -> None:
        c, self.task = self.config, task
        self.words = LearnedWords(task, c.layerwise, c.first_std)
        self.adapters = LowRankAdapters(task.backbone.layout, c.rank, c.scale, task.generator, task.backbone.device)

    def parameter_groups(self) -> list[dict]:
        return [{"params": list(self.words.parameters()), "lr": self.config.token_lr},
                {"params": list(self.adapters.parameters()), "lr": self.config.lr}]

    def token_group(self) -> TokenGroup:
        return self.words.group()

    def processor(self) -> AttentionProcessor:
        return AdapterProcessor(self.adapters)

    def finish(self) -> Outcome:
        dtype = stored_dtype(self.config.stored)
        return Outcome(self.words.stored(dtype), self.adapters.stored(dtype))

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"words": self.words, "adapters": self.adapters})

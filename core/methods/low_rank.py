"""What the methods share that train words and low-rank deltas of one rank: settings and life of a task."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..bank.tokens import TokenGroup
from ..model.backbone import AttentionProcessor
from ..settings import setting
from .base import AdapterProcessor, LearnedWords, LowRankAdapters, Method, Outcome, Task, require, stored_dtype


@dataclass(frozen=True)
class LowRankConfig:
    """lr, token_lr: of deltas and words; first_std: spread of the first word's start, 0 = that of the vocabulary; stored: type of the
    bank's tensors; the others describe themselves."""

    rank: int = setting(4, "Rank of the deltas. A higher rank holds more detail and makes the concept larger.", 1, 128)
    scale: float = setting(1.0, "Factor on the deltas; 1 = none.", 0.01, 16.0, 0.05)
    lr: float = 1e-4
    token_lr: float = 1e-3
    layerwise: bool = setting(True, "One vector per word and layer, or one for all layers, which exports as an embedding.")
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

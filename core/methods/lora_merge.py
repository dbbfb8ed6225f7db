"""LoRA-M and LoRA-C: every concept learned alone on the base, put together afterwards without any training. Two baselines.

The names and the rules of composition are those of CIDM's comparison (Dong et al., NeurIPS 2024, arXiv 2410.17594, Sec. 4 and released
code): LoRA-M merges the deltas of all g concepts equally, `W = W_0 + (1/g) sum_i dW_i`; LoRA-C ("composer") lets every concept's model
predict the noise and averages the g predictions, `eps = (1/g) sum_i eps_i`, which costs one UNet evaluation per concept.
CIDM's ablation counts LoRA-M as its own baseline, so what is learned here is CIDM's without its losses: layer-wise tokens, and rank-4
deltas of q, k, v, out at every site, with CIDM's rates. Ours: the attention regulariser of that released code is left out, as in the
other baselines here, so that the loss is the denoising loss alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..hosts.backbone import SiteProgram
from ..tokens import TokenGroup
from .base import AdapterProgram, LearnedWords, LowRankAdapters, Method, Outcome, Task, register, require, stored_dtype


@dataclass(frozen=True)
class LoraMergeConfig:
    """Settings as CIDM's, so that a comparison differs in the method alone."""

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


class LoraM(Method):
    """One set of weights, the mean of all concepts' deltas."""

    composition = "sum"
    builds_on_sum = False

    def __init__(self, config: LoraMergeConfig) -> None:
        self.config = config

    @classmethod
    def share(cls, concepts: int) -> float:
        return 1.0 / max(1, concepts)

    def begin(self, task: Task) -> None:
        c = self.config
        self.words = LearnedWords(task, c.layerwise, c.first_std)
        self.adapters = LowRankAdapters(task.backbone.layout, c.rank, c.scale, task.generator, task.backbone.device)

    def parameter_groups(self) -> list[dict]:
        return [{"params": list(self.words.parameters()), "lr": self.config.token_lr},
                {"params": list(self.adapters.parameters()), "lr": self.config.lr}]

    def token_group(self) -> TokenGroup:
        return self.words.group()

    def program(self) -> SiteProgram:
        return AdapterProgram(self.adapters)

    def finish(self) -> Outcome:
        dtype = stored_dtype(self.config.stored)
        return Outcome(self.words.stored(dtype), self.adapters.stored(dtype))

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"words": self.words, "adapters": self.adapters})


class LoraC(LoraM):
    """The mean of the predictions of all concepts' models. `share` is what stands for it where weights are asked for."""

    composition = "average"


register("lora_m", LoraMergeConfig, LoraM, "each concept learned alone, the deltas of all merged equally into one set of weights")
register("lora_c", LoraMergeConfig, LoraC, "each concept learned alone, the noise predictions of all concepts' models averaged")

"""TARA, token-aware LoRA (Peng et al., AAAI 2026, arXiv 2508.08812).

From the paper and its released code: low-rank deltas on q, k, v, out. The deltas of keys and values are
multiplied by a mask that is one at the concept's rare word and zero elsewhere (token focus masking). A loss
aligns the key of the rare word with the key of the class noun: the mean of `|(K + dK) c_rare - K c_class|`
over sites and features, with weight 1 (token alignment loss). The text encoder is frozen. Concepts are
learned alone and used together without a merge. The deltas of q and out then act on the whole picture.

Where we deviate, so that all low-rank methods here have the same words: the code writes "<rare word> dog"
with a frozen rare word, and adapts self-attention as well. Here the concept has learned layer-wise words, and
all of them are inside the mask. The second word starts as the class noun and stands for it in the loss,
without a gradient. A concept of one word has no alignment loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.token_lora import TokenLoraProcessor
from ..bank.composition import Composition, Kind
from ..model.context import Context
from ..model.deltas import Deltas
from ..model.sites import Site
from ..settings import setting
from .base import Forward, register
from .low_rank import LowRankConfig, LowRankMethod

FREE = ("to_q", "to_out")


@dataclass(frozen=True)
class TaraConfig(LowRankConfig):
    alignment: float = setting(1.0, "Weight of the token alignment loss; 0 = off. Paper: 1.", 0.0, 100.0, 0.1)


class TaraProcessor(TokenLoraProcessor):
    """Measures how far the keys of the concept's first word are from the frozen keys of its second word.

    Attributes:
        pairs: Row of the batch, position of the first and of the second word, `[3, P]`, for the P rows whose
            prompts have both words.
        distances: Mean absolute distance per site of the last forward pass, with gradient.
    """

    def __init__(self, name: str, word_bound: Deltas, free: Deltas) -> None:
        super().__init__({name: word_bound}, free)
        self.name = name

    def prepare(self, context: Context) -> None:
        super().prepare(context)
        pairs = [(row, *words[self.name][:2]) for row, words in enumerate(context.words)
                 if len(words.get(self.name, ())) > 1]
        self.pairs = torch.tensor(pairs, dtype=torch.long).view(-1, 3).T
        self.distances: list[Tensor] = []
        self.is_measuring = True

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        changed = super().project(site, projection, x, y)
        if projection == "to_k" and self.pairs.numel():
            rows, first, second = self.pairs
            # also when a block is recomputed, because it must give the same result
            distance = (changed[rows, first] - y[rows, second].detach()).abs().float().mean()
            if self.is_measuring:
                self.distances.append(distance)
        return changed

    def take(self) -> Tensor | None:
        """Returns the mean distance over sites, None without words, and stops measuring until the next
        forward pass."""
        self.is_measuring = False
        return torch.stack(self.distances).mean() if self.distances else None


@register("tara", TaraConfig, "layer-wise words; keys and values change at these words alone, queries and "
          "outputs for the whole prompt; keys stay near the class noun's")
class Tara(LowRankMethod):
    """latest: the processor of the last forward pass."""

    composition = Composition(Kind.WORDS, free=FREE)
    refinable = True
    config: TaraConfig

    def processor(self) -> TaraProcessor:
        self.latest = TaraProcessor(self.task.name, *self.by_activation())
        return self.latest

    def penalty(self, seen: Forward) -> dict[str, Tensor]:
        distance = self.latest.take()
        if distance is None or not self.config.alignment:
            return {}
        return {"alignment": self.config.alignment * distance}

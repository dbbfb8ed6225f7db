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

from ..bank.composition import Composition, Kind
from .base import register
from .low_rank import LowRankConfig, LowRankMethod


@dataclass(frozen=True)
class LoraMergeConfig(LowRankConfig):
    """Settings as CIDM's, so that a comparison differs in the method alone."""


class LoraM(LowRankMethod):
    """One set of weights, the mean of all concepts' deltas."""

    composition = Composition(Kind.SUM, merged=None)
    builds_on_sum = False


class LoraC(LoraM):
    """The mean of the predictions of all concepts' models. Where weights are asked for, their mean stands for it."""

    composition = Composition(Kind.AVERAGE, merged=None)


register("lora_m", LoraMergeConfig, LoraM, "each concept learned alone, the deltas of all merged equally into one set of weights")
register("lora_c", LoraMergeConfig, LoraC, "each concept learned alone, the noise predictions of all concepts' models averaged")

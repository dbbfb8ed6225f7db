"""LoRA-M and LoRA-C: each concept is learned alone on the base, and they are combined without training. Two
baselines.

Names and composition are those of CIDM's comparison (Dong et al., NeurIPS 2024, arXiv 2410.17594, Sec. 4 and
released code). LoRA-M merges the deltas of all g concepts equally, `W = W_0 + (1/g) sum_i dW_i`. LoRA-C
("composer") averages the noise predictions of all concepts' models, `eps = (1/g) sum_i eps_i`, which costs
one UNet evaluation per concept.

CIDM's ablation lists LoRA-M as its own baseline. We therefore learn what CIDM learns, without its losses:
layer-wise tokens, and rank-4 deltas of q, k, v, out at every site, at CIDM's rates. Ours: the attention
regulariser of the released code is left out, as in the other baselines here.
"""

from __future__ import annotations

from ..bank.composition import Composition, Kind
from .base import register
from .low_rank import LowRankConfig, LowRankMethod


@register("lora_m", LowRankConfig,
          "each concept learned alone, the deltas of all merged equally into one set of weights")
class LoraM(LowRankMethod):
    """One set of weights: the mean of all concepts' deltas."""

    composition = Composition(Kind.SUM, merged=None)
    builds_on_sum = False


@register("lora_c", LowRankConfig,
          "each concept learned alone, the noise predictions of all concepts' models averaged")
class LoraC(LoraM):
    """The mean prediction of all concepts' models; where weights are needed, the mean of the deltas."""

    composition = Composition(Kind.AVERAGE, merged=None)

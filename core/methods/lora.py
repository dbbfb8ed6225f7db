"""A plain low-rank adapter per concept, prompt-activated: the control of all methods here.

It trains what the word-bound method trains (layer-wise words, rank-4 deltas on q, k, v, out of every site)
with the denoising loss alone. A prompt that names the concept folds its deltas into the weights. So retention
is 1 and the base does not change, as with every method that stores concepts separately. Another method is
worth what it adds to this control.
"""

from __future__ import annotations

from .base import register
from .low_rank import LowRankMethod, ProjectionsConfig


@register("lora", ProjectionsConfig, "layer-wise words and prompt-activated low-rank deltas without any "
          "penalty; the control")
class Lora(LowRankMethod):
    needs_words = False
    refinable = True
    config: ProjectionsConfig

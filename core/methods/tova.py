"""ToVA, token-wise value adaptation (ConceptSplit, Lim et al., ICCV 2025, arXiv 2510.04668).

From the paper: low-rank deltas of the value projections, `V' = V + delta_i^T A_i(c_i)`, where delta_i is one
at the token of the concept and zero at all others. The paper finds that changed keys disturb the attention of
the base and mix concepts.

Where we deviate: the paper adapts an existing word of the prompt. Here the concept has learned layer-wise
words, as in all low-rank methods of this project, and the deltas act at these words. The second part of the
paper, LODA, changes latents while sampling. It is not part of this method.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import register
from .bound import Bound, BoundConfig


@dataclass(frozen=True)
class TovaConfig(BoundConfig):
    apart: bool = False
    projections: str = "v"


@register("tova", TovaConfig, "layer-wise words, and low-rank deltas of the values at these words alone")
class Tova(Bound):
    config: TovaConfig

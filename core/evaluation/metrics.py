"""Metrics with the papers' definitions (CIDM's evaluation code; see each docstring). All take features of unit length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CLIPSCORE_WEIGHT = 2.5  # Hessel et al. (2021), as CIDM's evaluation uses it


def image_alignment(generated: Tensor, references: Tensor) -> float:
    """IA: mean cosine of all generated `[M, D]` with all reference `[N, D]` pictures."""
    return float((generated @ references.T).mean())


def text_alignment(images: Tensor, texts: Tensor) -> float:
    """TA: mean of 2.5 max(cos, 0) over pairs of picture `[M, D]` and its prompt `[M, D]` (concepts replaced by class nouns)."""
    return float(CLIPSCORE_WEIGHT * (images * texts).sum(-1).clamp(min=0).mean())


def retention(alignment: Sequence[Sequence[float]]) -> list[float]:
    """Final over just learned, per concept: alignment[i][j] is IA of concept j after task i (j <= i)."""
    last = alignment[-1]
    return [last[j] / alignment[j][j] for j in range(len(last))]


def forgetting(alignment: Sequence[Sequence[float]]) -> list[float]:
    """Drop from the best to the last value, per concept (LRCP's definition)."""
    return [max(row[j] for row in alignment[j:]) - alignment[-1][j] for j in range(len(alignment[-1]))]


def gap_closed(learned: float, noun: float, real: float) -> float:
    """How much of the way from the class noun's pictures to real ones learning went: 0 = nothing, 1 = as good as real."""
    return (learned - noun) / (real - noun)


def area_under_curve(positives: Tensor, negatives: Tensor) -> float:
    """ROC AUC: chance that a positive scores above a negative, ties count half."""
    difference = positives.view(-1, 1) - negatives.view(1, -1)
    return float(((difference > 0).float() + 0.5 * (difference == 0).float()).mean())


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)

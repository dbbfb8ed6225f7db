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


def mmd(one: Tensor, other: Tensor) -> float:
    """Squared maximum mean discrepancy of two sets of features `[M, D]`, `[N, D]`, unbiased, polynomial kernel (x·y / D + 1)^3: what KID is
    on Inception features and C-LoRA's A_MMD and F_MMD are on CLIP features. At least two of each."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x.double() @ y.double().T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(within(one) + within(other) - 2 * kernel(one, other).mean())


def a_mmd(real: Sequence[Tensor], final: Sequence[Tensor]) -> float:
    """C-LoRA's A_MMD: mean over concepts of the MMD between real pictures and those made after the last task; lower is better."""
    return sum(mmd(r, f) for r, f in zip(real, final, strict=True)) / len(final)


def f_mmd(first: Sequence[Tensor], final: Sequence[Tensor]) -> float:
    """C-LoRA's F_MMD: mean over all concepts but the last of the MMD between pictures made right after their task and after the last."""
    return sum(mmd(a, b) for a, b in zip(first[:-1], final[:-1], strict=True)) / max(1, len(final) - 1)


def task_forgetting_rate(alignment: Sequence[Sequence[float]]) -> float:
    """TFR (L2DM names it, its definition was not found): mean drop from just learned to the end, over all concepts but the last."""
    last = alignment[-1]
    return sum(alignment[j][j] - last[j] for j in range(len(last) - 1)) / max(1, len(last) - 1)


def bleed(features: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
    """`[K, K]`: how much pictures of concept i `[M, D]` look like real ones of concept j `[N, D]`. Off the diagonal: lower is better."""
    return torch.tensor([[float((own @ other.T).mean()) for other in references] for own in features])


def drift(before: Tensor, after: Tensor) -> float:
    """Base drift: root mean square difference of the same pictures before and after, as a share of the full range (-1..1)."""
    return float(((after.double() - before.double()) / 2).square().mean().sqrt())

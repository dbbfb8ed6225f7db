"""Metrics as defined in the papers. The source is CIDM's evaluation code unless a docstring names another
one.

All features have unit length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CLIPSCORE_WEIGHT = 2.5  # Hessel et al. (2021), as in CIDM's evaluation


def image_alignment(generated: Tensor, references: Tensor) -> float:
    """IA: mean cosine of all generated pictures `[M, D]` with all reference pictures `[N, D]`."""
    return float((generated @ references.T).mean())


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of `[n]` values; 0 for a single one."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0


def text_alignment(images: Tensor, texts: Tensor) -> float:
    """TA: mean of 2.5 max(cos, 0) over pairs of a picture and its prompt.

    Args:
        images: `[M, D]`.
        texts: `[M, D]`, prompts with class nouns instead of concepts.
    """
    return float(CLIPSCORE_WEIGHT * (images * texts).sum(-1).clamp(min=0).mean())


def retention(alignment: Sequence[Sequence[float]]) -> list[float]:
    """Retained share of each concept: IA after the last task / IA right after the concept's task.

    Args:
        alignment: `alignment[i][j]` is IA of concept j after task i, for j <= i.
    """
    last = alignment[-1]
    return [last[j] / alignment[j][j] for j in range(len(last))]


def forgetting(alignment: Sequence[Sequence[float]]) -> list[float]:
    """Drop of each concept's IA from its best to its last value (LRCP's definition). See `retention` for
    `alignment`.
    """
    return [max(row[j] for row in alignment[j:]) - alignment[-1][j] for j in range(len(alignment[-1]))]


def gap_closed(learned: float, noun: float, real: float) -> float:
    """Position of a learned concept between pictures of its class noun (0) and real pictures (1)."""
    return (learned - noun) / (real - noun)


def area_under_curve(positives: Tensor, negatives: Tensor) -> float:
    """ROC AUC: the probability that a positive scores above a negative; ties count half."""
    difference = positives.view(-1, 1) - negatives.view(1, -1)
    return float(((difference > 0).float() + 0.5 * (difference == 0).float()).mean())


def unit(x: Tensor) -> Tensor:
    """Vectors `[..., D]` scaled to unit length."""
    return torch.nn.functional.normalize(x, dim=-1)


def mmd(left: Tensor, right: Tensor) -> float:
    """Squared maximum mean discrepancy, unbiased, with the polynomial kernel (x·y / D + 1)^3.

    With Inception features this is KID; with CLIP features, C-LoRA's A_MMD and F_MMD.

    Args:
        left, right: features `[M, D]` and `[N, D]`; M and N are 2 or more.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x.double() @ y.double().T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(within(left) + within(right) - 2 * kernel(left, right).mean())


def a_mmd(real: Sequence[Tensor], final: Sequence[Tensor]) -> float:
    """C-LoRA's A_MMD: MMD between real pictures and those generated after the last task, averaged over
    concepts. Lower is better.
    """
    return sum(mmd(r, f) for r, f in zip(real, final, strict=True)) / len(final)


def f_mmd(first: Sequence[Tensor], final: Sequence[Tensor]) -> float:
    """C-LoRA's F_MMD: MMD between pictures generated right after a concept's task and after the last task,
    averaged over all concepts except the last.
    """
    return sum(mmd(a, b) for a, b in zip(first[:-1], final[:-1], strict=True)) / max(1, len(final) - 1)


def task_forgetting_rate(alignment: Sequence[Sequence[float]]) -> float:
    """TFR: mean drop of IA between a concept's own task and the last task, over all concepts except the last.

    L2DM reports this figure, but we found no definition. See `retention` for `alignment`.
    """
    last = alignment[-1]
    return sum(alignment[j][j] - last[j] for j in range(len(last) - 1)) / max(1, len(last) - 1)


def confusion(features: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
    """Mean cosine of the pictures of every concept with the real pictures of every concept.

    Args:
        features: `[M, D]` of each concept's pictures.
        references: `[N, D]` of each concept's real pictures.

    Returns:
        `[K, K]`; row i, column j compares pictures of concept i with real ones of concept j. The diagonal is
        IA; for other entries, lower is better.
    """
    return torch.tensor([[float((drawn @ real.T).mean()) for real in references] for drawn in features])


def base_change(before: Tensor, after: Tensor) -> float:
    """Root mean square difference of pictures before and after learning, as a fraction of the full range. 0 =
    bit-identical.

    Args:
        before, after: `[B, 3, H, W]` in -1..1, from the same prompts and seeds.
    """
    return float(((after.double() - before.double()) / 2).square().mean().sqrt())

"""Similarity of concepts: cosines of their deltas and of their word vectors.

Deltas are compared in stored form, so that no a×b matrix is built. For low-rank deltas, <s U D, t V E> = s t
sum((U^T V) * (D E^T)). For sparse deltas, only the entries that both change count. A low-rank delta is not
compared with a sparse one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..bank.tokens import TokenGroup
from ..model.deltas import Delta, DeltaKey, Deltas, LowRankDelta, SparseDelta

TINY = 1e-30      # used instead of the largest entry of an all-zero factor
CHUNK = 2**22      # maximum entries of a table in memory


def _side_by_side(deltas: Sequence[LowRankDelta]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Concatenates all deltas. Each factor is scaled to a largest entry of 1, so that products stay in
    float32's range.

    Returns:
        Factors `[a, R]` and `[R, b]`, R the sum of ranks; the delta's number for each of the R columns; the
        scale of each delta `[n]`.
    """
    ups, downs = [delta.up.float() for delta in deltas], [delta.down.float() for delta in deltas]
    sizes = [(max(float(up.abs().amax()), TINY), max(float(down.abs().amax()), TINY))
             if up.numel() and down.numel() else (1.0, 1.0)
             for up, down in zip(ups, downs, strict=True)]
    scales = torch.tensor([delta.scale * u * d for delta, (u, d) in zip(deltas, sizes, strict=True)],
                          dtype=torch.float64)
    owner = torch.arange(len(deltas)).repeat_interleave(torch.tensor([up.shape[1] for up in ups]))
    up = torch.cat([up / u for up, (u, _) in zip(ups, sizes, strict=True)], dim=1)
    return up, torch.cat([down / d for down, (_, d) in zip(downs, sizes, strict=True)]), owner, scales


def _low_rank_products(left: Sequence[LowRankDelta], right: Sequence[LowRankDelta]) -> Tensor:
    """Inner products `[n, m]` of low-rank deltas."""
    up, down, owner, scales = _side_by_side(left)
    other_up, other_down, other_owner, other_scales = (up, down, owner,
                                                       scales) if left is right else _side_by_side(right)
    total = torch.zeros(len(left), len(right), dtype=torch.float64)
    for rows in torch.arange(len(owner)).split(max(1, CHUNK // max(1, len(other_owner)))):
        products = (up[:, rows].T @ other_up) * (down[rows] @ other_down.T)      # [r, R]
        sums = torch.zeros(len(rows), len(right), dtype=torch.float64)
        sums.index_add_(1, other_owner, products.double())
        total.index_add_(0, owner[rows], sums)
    return total * scales[:, None] * other_scales


def _sparse_products(left: Sequence[SparseDelta], right: Sequence[SparseDelta]) -> Tensor:
    """Inner products `[n, m]` of sparse deltas, from tables of concepts × changed entries, chunk by chunk."""
    deltas = [*left, *right]
    _, places = torch.cat([delta.indices.long() for delta in deltas]).unique(return_inverse=True)
    counts = torch.tensor([delta.indices.numel() for delta in deltas])
    owner = torch.arange(len(deltas)).repeat_interleave(counts)
    values = torch.cat([delta.scale * delta.values.double() for delta in deltas])
    order = places.argsort()
    places, owner, values = places[order], owner[order], values[order]
    width, chunk = int(places[-1]) + 1 if len(places) else 0, max(1, CHUNK // len(deltas))
    total = torch.zeros(len(left), len(right), dtype=torch.float64)
    for first in range(0, width, chunk):
        begin, end = torch.searchsorted(places, torch.tensor([first, first + chunk])).tolist()
        table = torch.zeros(len(deltas), min(chunk, width - first), dtype=torch.float64)
        table[owner[begin:end], places[begin:end] - first] = values[begin:end]
        total += table[: len(left)] @ table[len(left) :].T
    return total


def _squared(delta: Delta) -> float:
    """Squared Frobenius norm of a delta; 0 for slots, whose order means nothing."""
    if isinstance(delta, LowRankDelta):
        up, down = delta.up.double(), delta.down.double()
        return delta.scale**2 * float(((up.T @ up) * (down @ down.T)).sum())
    if isinstance(delta, SparseDelta):
        return float((delta.scale * delta.values.double()).square().sum())
    return 0.0


def _norms(concepts: Sequence[Deltas]) -> Tensor:
    """The norm of each concept's deltas, taken as one vector, `[n]`."""
    return torch.tensor([sum(map(_squared, deltas.values())) for deltas in concepts],
                        dtype=torch.float64).sqrt()


AnyDelta = TypeVar("AnyDelta", LowRankDelta, SparseDelta)


def _at(concepts: Sequence[Deltas], key: DeltaKey, form: type[AnyDelta]) -> tuple[Tensor, list[AnyDelta]]:
    """The deltas of one form at a site's projection, and the indices of their concepts."""
    held = [(i, delta) for i, deltas in enumerate(concepts) if isinstance(delta := deltas.get(key), form)]
    return torch.tensor([i for i, _ in held], dtype=torch.long), [delta for _, delta in held]


def _add_products(total: Tensor, left: Sequence[Deltas], right: Sequence[Deltas], key: DeltaKey,
                  form: type[AnyDelta], products: Callable[[Sequence[AnyDelta], Sequence[AnyDelta]], Tensor]
                  ) -> tuple[Tensor, Tensor]:
    """Adds the inner products of deltas of one form; returns the rows and columns that have such deltas."""
    rows, deltas = _at(left, key, form)
    columns, others = (rows, deltas) if left is right else _at(right, key, form)
    if deltas and others:
        total[rows[:, None], columns] += products(deltas, others)
    return rows, columns


def delta_cosines(left: Sequence[Deltas], right: Sequence[Deltas]) -> Tensor:
    """Cosines of concepts' deltas, each concept's deltas of all projections of all sites as one vector.

    Returns:
        `[n, m]`; NaN if a concept has no deltas, or if two deltas of one projection differ in form.
    """
    total = torch.zeros(len(left), len(right), dtype=torch.float64)
    left_keys, right_keys = ({key for deltas in side for key in deltas} for side in (left, right))
    for key in sorted(left_keys & right_keys):
        low, low_columns = _add_products(total, left, right, key, LowRankDelta, _low_rank_products)
        sparse, sparse_columns = _add_products(total, left, right, key, SparseDelta, _sparse_products)
        total[low[:, None], sparse_columns] = total[sparse[:, None], low_columns] = math.nan
    norms = _norms(left)
    cosines = total / norms[:, None] / (norms if left is right else _norms(right))      # 0 / 0 gives NaN
    return torch.where(cosines.isfinite(), cosines, math.nan).clamp(-1, 1)


def _directions(group: TokenGroup, copies: int) -> Tensor:
    """Mean of a group's words, `[copies, sum of widths]`, normalised per text encoder and as a whole."""
    means = [group.vectors[encoder].double().mean(1) for encoder in sorted(group.vectors)]
    return torch.cat([torch.nn.functional.normalize(mean, dim=-1).expand(copies, -1) for mean in means],
                     dim=-1) / len(means) ** 0.5


def word_cosines(left: Sequence[TokenGroup], right: Sequence[TokenGroup]) -> Tensor:
    """Cosines `[n, m]` of the mean word vectors, averaged over layer copies and text encoders."""
    copies = max([group.copies for group in (*left, *right)], default=1)
    rows, columns = (torch.stack([_directions(group, copies).flatten() for group in side])
                     for side in (left, right))
    return rows @ columns.T / copies

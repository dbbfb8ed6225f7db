"""How alike concepts are in what they change and in their words: cosines of deltas and of word vectors.

Deltas are compared in the form in which they are stored. Of low-rank ones, <s U D, t V E> = s t sum((U^T V) * (D E^T)); of sparse ones only
the places that both change count. No a×b matrix is built. A low-rank and a sparse delta of one projection are not compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..bank.tokens import TokenGroup
from ..model.deltas import Delta, DeltaKey, Deltas, LowRankDelta, SparseDelta

TINY = 1e-30      # of a factor of zeros
PIECE = 2**22      # numbers of a table of products that is held at once


def _side_by_side(deltas: Sequence[LowRankDelta]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors `[a, R]` and `[R, b]` of all deltas, largest number 1, so that none is out of float32's range; whose each of the R is; what
    each delta is to be multiplied with `[n]`."""
    ups, downs = [delta.up.float() for delta in deltas], [delta.down.float() for delta in deltas]
    sizes = [(max(float(up.abs().amax()), TINY), max(float(down.abs().amax()), TINY)) if up.numel() and down.numel() else (1.0, 1.0)
             for up, down in zip(ups, downs, strict=True)]
    scales = torch.tensor([delta.scale * u * d for delta, (u, d) in zip(deltas, sizes, strict=True)], dtype=torch.float64)
    owner = torch.arange(len(deltas)).repeat_interleave(torch.tensor([up.shape[1] for up in ups]))
    up = torch.cat([up / u for up, (u, _) in zip(ups, sizes, strict=True)], dim=1)
    return up, torch.cat([down / d for down, (_, d) in zip(downs, sizes, strict=True)]), owner, scales


def _low_rank_products(left: Sequence[LowRankDelta], right: Sequence[LowRankDelta]) -> Tensor:
    """Inner products `[n, m]` of deltas as wholes."""
    ours = _side_by_side(left)
    theirs = ours if left is right else _side_by_side(right)
    found = torch.zeros(len(left), len(right), dtype=torch.float64)
    for rows in torch.arange(len(ours[2])).split(max(1, PIECE // max(1, len(theirs[2])))):
        products = (ours[0][:, rows].T @ theirs[0]) * (ours[1][rows] @ theirs[1].T)      # [r, R]
        sums = torch.zeros(len(rows), len(right), dtype=torch.float64).index_add_(1, theirs[2], products.double())
        found.index_add_(0, ours[2][rows], sums)
    return found * ours[3][:, None] * theirs[3]


def _sparse_products(left: Sequence[SparseDelta], right: Sequence[SparseDelta]) -> Tensor:
    """The same of sparse deltas: in tables of concepts × the places that any of them changes, a piece after the other."""
    deltas = [*left, *right]
    _, places = torch.cat([delta.indices.long() for delta in deltas]).unique(return_inverse=True)
    owner = torch.arange(len(deltas)).repeat_interleave(torch.tensor([delta.indices.numel() for delta in deltas]))
    values = torch.cat([delta.scale * delta.values.double() for delta in deltas])
    order = places.argsort()
    places, owner, values = places[order], owner[order], values[order]
    width, piece = int(places[-1]) + 1 if len(places) else 0, max(1, PIECE // len(deltas))
    found = torch.zeros(len(left), len(right), dtype=torch.float64)
    for first in range(0, width, piece):
        begin, end = torch.searchsorted(places, torch.tensor([first, first + piece])).tolist()
        table = torch.zeros(len(deltas), min(piece, width - first), dtype=torch.float64)
        table[owner[begin:end], places[begin:end] - first] = values[begin:end]
        found += table[: len(left)] @ table[len(left) :].T
    return found


FORMS = ((LowRankDelta, _low_rank_products), (SparseDelta, _sparse_products))


def _squared(delta: Delta) -> float:
    """Squared length of a delta."""
    if isinstance(delta, LowRankDelta):
        up, down = delta.up.double(), delta.down.double()
        return delta.scale**2 * float(((up.T @ up) * (down @ down.T)).sum())
    return float((delta.scale * delta.values.double()).square().sum())


def _lengths(concepts: Sequence[Deltas]) -> Tensor:
    return torch.tensor([sum(map(_squared, deltas.values())) for deltas in concepts], dtype=torch.float64).sqrt()


def _at(concepts: Sequence[Deltas], key: DeltaKey, form: type) -> tuple[Tensor, list[Delta]]:
    """Who has a delta of that form there, and the deltas."""
    found = [(i, deltas[key]) for i, deltas in enumerate(concepts) if isinstance(deltas.get(key), form)]
    return torch.tensor([i for i, _ in found], dtype=torch.long), [delta for _, delta in found]


def delta_cosines(left: Sequence[Deltas], right: Sequence[Deltas]) -> Tensor:
    """`[n, m]`: cosine of the concepts' deltas, all projections of all sites as one vector. NaN: one of the two has none, or they are of
    different forms somewhere."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64)
    for key in sorted({key for deltas in left for key in deltas} & {key for deltas in right for key in deltas}):
        places = []
        for form, products in FORMS:
            rows, ours = _at(left, key, form)
            columns, theirs = (rows, ours) if left is right else _at(right, key, form)
            if ours and theirs:
                total[rows[:, None], columns] += products(ours, theirs)
            places.append((rows, columns))
        (low, low_right), (sparse, sparse_right) = places
        total[low[:, None], sparse_right] = total[sparse[:, None], low_right] = math.nan
    ours = _lengths(left)
    found = total / ours[:, None] / (ours if left is right else _lengths(right))      # 0 / 0 is NaN
    return torch.where(found.isfinite(), found, math.nan).clamp(-1, 1)


def _directions(group: TokenGroup, copies: int) -> Tensor:
    """`[copies, sum of widths]`: the mean of a group's words, of unit length for every text encoder."""
    means = [group.vectors[encoder].double().mean(1) for encoder in sorted(group.vectors)]
    return torch.cat([torch.nn.functional.normalize(mean, dim=-1).expand(copies, -1) for mean in means], dim=-1) / len(means) ** 0.5


def word_cosines(left: Sequence[TokenGroup], right: Sequence[TokenGroup]) -> Tensor:
    """`[n, m]`: cosine of the mean word vectors, averaged over layer copies and text encoders."""
    copies = max([group.copies for group in (*left, *right)], default=1)
    ours, theirs = (torch.stack([_directions(group, copies).flatten() for group in side]) for side in (left, right))
    return ours @ theirs.T / copies

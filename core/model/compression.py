"""Compresses low-rank deltas to the smallest sufficient rank, by SVD of their factors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .deltas import DeltaKey, LowRankDelta
from .sites import PROJECTIONS
from .storage import stored_deltas

NOISE = 1e-5      # singular values below this fraction of the largest are float32 rounding error


def svd(delta: LowRankDelta) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of a low-rank delta through its factors: `[a, k]`, `[k]`, `[k, b]` in double precision."""
    left, right = torch.linalg.qr(delta.up.double() * delta.scale), torch.linalg.qr(delta.down.double().T)
    u, s, v = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    return left.Q @ u, s, v @ right.Q.T


def _truncated(factors: tuple[Tensor, Tensor, Tensor], rank: int) -> LowRankDelta:
    u, s, v = factors
    up, down = torch.zeros(u.shape[0], rank), torch.zeros(rank, v.shape[1])
    kept, root = min(rank, len(s)), s[:rank].sqrt()
    up[:, :kept], down[:kept] = u[:, :kept] * root, root.unsqueeze(1) * v[:kept]
    return LowRankDelta(up, down)


def compressed(deltas: Mapping[DeltaKey, LowRankDelta], dtype: torch.dtype, kept: float = 1.0,
               floors: Mapping[DeltaKey, float] | None = None) -> dict[DeltaKey, LowRankDelta]:
    """Compresses deltas to the smallest common rank per projection, since a bank stores one rank each.

    Args:
        deltas: Low-rank deltas of any rank.
        dtype: Type of the result. Its two factors have the same norm.
        kept: Share of the sum of singular values that must remain. 1 keeps all values above the rounding
            error of `dtype`, relative to the largest value or to the delta's floor, whichever is larger.
        floors: Per delta, the magnitude of the weights that it was computed from; rounding errors scale with
            it.
    """
    spectra, needed = {key: svd(delta) for key, delta in deltas.items()}, dict.fromkeys(PROJECTIONS, 1)
    for key, (_, s, _) in spectra.items():
        floor = max(NOISE, torch.finfo(dtype).eps) * max(float(s[0]), (floors or {}).get(key, 0.0))
        rank = int((s > floor).sum())
        if kept < 1 and s.sum() > 0:
            rank = min(rank, 1 + int((s.cumsum(0) / s.sum() < kept).sum()))
        needed[key[1]] = max(needed[key[1]], rank)
    smallest = {key: _truncated(factors, needed[key[1]]) for key, factors in spectra.items()}
    return stored_deltas(smallest, dtype)

"""Deltas as low-rank factors: the one form that LoRA files hold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..deltas import Delta, DeltaKey, Deltas, LowRankDelta
from ..errors import ConceptError

DEFAULT_RANK = 32
DEFAULT_ERROR = 0.05
_HALF_ERROR = 1e-3      # fp16 rounds to 5e-4; more means that numbers left its range


@dataclass(frozen=True)
class Factors:
    """deltas: all low rank. error: what cutting sparse ones to `rank` lost, Frobenius norm of the difference over the norm of the
    sparse deltas, all of them together; None when there were none and nothing was cut."""

    deltas: dict[DeltaKey, LowRankDelta]
    rank: int
    error: float | None = None


def low_rank(deltas: Deltas, owner: str, rank: int = DEFAULT_RANK, max_error: float = DEFAULT_ERROR) -> Factors:
    """The deltas (a concept's, or an aggregate's) as factors. Low-rank ones stay as they are, sparse ones go through an SVD.

    Raises ConceptError when nothing is there to export, or when `rank` loses more than `max_error` of the sparse deltas; the
    sentence names the rank that would do.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ConceptError(f"rank is {rank!r}; allowed: whole numbers of 1 or more")
    if not 0 <= max_error < 1:
        raise ConceptError(f"max_error is {max_error!r}; allowed: 0 to below 1")
    factors = {key: delta for key, delta in deltas.items() if isinstance(delta, LowRankDelta) and delta.scale}
    spectra = []
    for key, delta in deltas.items():
        if not isinstance(delta, LowRankDelta):
            cut, spectrum = _truncated(delta, rank, f"{owner}: {key[1]} of site {key[0]}")
            spectra.append(spectrum)
            if cut is not None:
                factors[key] = cut
    if not factors:
        raise ConceptError(f"{owner} changes no weights, so there is nothing for a LoRA file to hold; allowed: the format 'embedding'")
    return Factors(factors, rank, _check_error(spectra, owner, rank, max_error) if spectra else None)


def _truncated(delta: Delta, rank: int, where: str) -> tuple[LowRankDelta | None, Tensor]:
    """Best approximation of that rank (Eckart and Young, 1936), and all singular values, largest first."""
    dense = delta.dense().cpu()
    if not torch.isfinite(dense).all():
        raise ConceptError(f"{where} holds NaN or infinity; allowed: finite numbers")
    left, spectrum, right = torch.linalg.svd(dense, full_matrices=False)
    kept = min(rank, int((spectrum > 0).sum()))
    root = spectrum[:kept].sqrt()       # the same magnitude on both sides keeps both in fp16's range
    return (LowRankDelta(left[:, :kept] * root, root.unsqueeze(1) * right[:kept]) if kept else None), spectrum.double()


def _check_error(spectra: list[Tensor], owner: str, rank: int, max_error: float) -> float:
    longest = max(spectrum.numel() for spectrum in spectra)
    energy = sum(torch.nn.functional.pad(spectrum**2, (0, longest - spectrum.numel())) for spectrum in spectra)
    # lost[r] = what is left out at rank r; the tail sums lose no digits, unlike 1 - head
    lost = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
    errors = (lost / lost[0].clamp_min(1e-300)).sqrt()
    error = float(errors[min(rank, longest)])
    if error > max_error:
        needed = int((errors <= max_error).nonzero()[0])
        raise ConceptError(f"{owner} has sparse deltas of which rank {rank} loses {error:.3f} (relative); allowed: up to {max_error:g}, "
                           f"which rank {needed} keeps")
    return error


def check_strength(strength: float) -> float:
    """Strength 0 is refused: kohya's programs read `alpha = 0` as 'alpha = rank', which is full strength."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not math.isfinite(strength) or strength == 0:
        raise ConceptError(f"strength is {strength!r}; allowed: finite numbers other than 0")
    return float(strength)


def compact(tensor: Tensor, name: str) -> Tensor:
    """The tensor in fp16, as LoRA files usually are; in fp32 when fp16's range does not hold it."""
    exact = tensor.detach().float().cpu().contiguous()
    if not torch.isfinite(exact).all():
        raise ConceptError(f"tensor '{name}' holds NaN or infinity; allowed: finite numbers")
    half = exact.half()
    fits = bool(torch.isfinite(half).all()) and (half.float() - exact).norm() <= _HALF_ERROR * exact.norm()
    return half if fits else exact.clone()

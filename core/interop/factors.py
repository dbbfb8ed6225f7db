"""Deltas as low-rank factors: the one form that LoRA files hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConceptError
from ..model.deltas import Delta, DeltaKey, Deltas, LowRankDelta, concatenate, weighted_sum

DEFAULT_RANK = 32
DEFAULT_ERROR = 0.05
_HALF_ERROR = 1e-3      # fp16 rounds to 5e-4; more means that numbers left its range


@dataclass(frozen=True)
class Factors:
    """deltas: all low rank. error: what cutting some to `rank` lost (sparse ones; of a sum that is to have that rank all), Frobenius norm
    of the difference over the norm of what was cut, all of it together; None when nothing had to be."""

    deltas: dict[DeltaKey, LowRankDelta]
    rank: int
    error: float | None = None


def low_rank(deltas: Deltas, owner: str, rank: int = DEFAULT_RANK, max_error: float = DEFAULT_ERROR) -> Factors:
    """The deltas of a concept as factors. Low-rank ones stay as they are, sparse ones go through an SVD.

    Raises ConceptError when nothing is there to export, or when `rank` loses more than `max_error` of the sparse deltas; the
    sentence names the rank that would do.
    """
    factors = {key: delta for key, delta in deltas.items() if isinstance(delta, LowRankDelta) and delta.scale}
    cut, error = _cut({key: delta for key, delta in deltas.items() if not isinstance(delta, LowRankDelta)}, owner, rank, max_error)
    return _some(Factors(factors | cut, rank, error), owner)


def low_rank_sum(parts: Mapping[DeltaKey, Sequence[tuple[float, Delta]]], owner: str, rank: int | None = None,
                 max_error: float = DEFAULT_ERROR) -> Factors:
    """Weighted sums of deltas (an aggregate's) as factors. rank: of every sum, and what that loses is at most `max_error`; without it sums
    of low-rank deltas are exact, their factors side by side, and only sparse parts are cut, to DEFAULT_RANK."""
    if rank is not None:
        sums = {key: weighted_sum(list(group)) for key, group in parts.items()}
        small = {key: delta for key, delta in sums.items() if isinstance(delta, LowRankDelta) and delta.down.shape[0] <= rank}
        cut, error = _cut({key: delta for key, delta in sums.items() if key not in small}, owner, rank, max_error, "deltas")
        return _some(Factors({key: delta for key, delta in small.items() if delta.scale} | cut, rank, error), owner)
    kinds: tuple[dict, dict] = {}, {}
    for key, group in parts.items():
        for weight, delta in group:
            kinds[isinstance(delta, LowRankDelta)].setdefault(key, []).append((weight, delta))
    rest, exact = kinds
    cut, error = _cut({key: weighted_sum(group) for key, group in rest.items()}, owner, DEFAULT_RANK, max_error)
    sums = {key: [*exact.get(key, ()), *([(1.0, cut[key])] if key in cut else ())] for key in exact | cut}
    factors = {key: _no_wider(concatenate(group), f"{owner}: {key[1]} of site {key[0]}") for key, group in sums.items()}
    return _some(Factors({key: delta for key, delta in factors.items() if delta is not None}, DEFAULT_RANK, error), owner)


def _some(factors: Factors, owner: str) -> Factors:
    if not factors.deltas:
        raise ConceptError(f"{owner} changes no weights, so there is nothing for a LoRA file to hold; allowed: the format 'embedding'")
    return factors


def _no_wider(delta: LowRankDelta, where: str) -> LowRankDelta | None:
    """The same with no more columns than the weight has rank; None for a sum of nothing."""
    most = min(delta.shape)
    return delta if delta.down.shape[0] <= most else _truncated(delta, most, where)[0]


def _cut(deltas: Deltas, owner: str, rank: int, max_error: float,
         what: str = "sparse deltas") -> tuple[dict[DeltaKey, LowRankDelta], float | None]:
    """Each to `rank`, and what that loses of all of them."""
    if not isinstance(rank, int) or rank < 1:
        raise ConceptError(f"rank is {rank!r}; allowed: whole numbers of 1 or more")
    if not 0 <= max_error < 1:
        raise ConceptError(f"max_error is {max_error!r}; allowed: 0 to below 1")
    factors, spectra = {}, []
    for key, delta in deltas.items():
        cut, spectrum = _truncated(delta, rank, f"{owner}: {key[1]} of site {key[0]}")
        spectra.append(spectrum)
        if cut is not None:
            factors[key] = cut
    return factors, _check_error(spectra, f"{owner} has {what}", rank, max_error) if spectra else None


def _svd(delta: Delta) -> tuple[Tensor, Tensor, Tensor]:
    """Of narrow factors by their QR decompositions: the matrix between is `r x r`."""
    if not isinstance(delta, LowRankDelta) or delta.down.shape[0] >= min(delta.shape):
        return torch.linalg.svd(delta.dense().cpu(), full_matrices=False)
    (q, r), (p, s) = (torch.linalg.qr(side.float().cpu()) for side in (delta.up, delta.down.T))
    left, spectrum, right = torch.linalg.svd(delta.scale * (r @ s.T), full_matrices=False)
    return q @ left, spectrum, right @ p.T


def _truncated(delta: Delta, rank: int, where: str) -> tuple[LowRankDelta | None, Tensor]:
    """Best approximation of that rank (Eckart and Young, 1936), and all singular values, largest first."""
    if not all(torch.isfinite(tensor).all() for tensor in delta.tensors()):
        raise ConceptError(f"{where} holds NaN or infinity; allowed: finite numbers")
    left, spectrum, right = _svd(delta)
    kept = min(rank, int((spectrum > 0).sum()))
    root = spectrum[:kept].sqrt()       # the same magnitude on both sides keeps both in fp16's range
    return (LowRankDelta(left[:, :kept] * root, root.unsqueeze(1) * right[:kept]) if kept else None), spectrum.double()


def _check_error(spectra: list[Tensor], what: str, rank: int, max_error: float) -> float:
    longest = max(spectrum.numel() for spectrum in spectra)
    energy = sum(torch.nn.functional.pad(spectrum**2, (0, longest - spectrum.numel())) for spectrum in spectra)
    # lost[r] = what is left out at rank r; the tail sums lose no digits, unlike 1 - head
    lost = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
    errors = (lost / lost[0].clamp_min(1e-300)).sqrt()
    error = float(errors[min(rank, longest)])
    if error > max_error:
        needed = int((errors <= max_error).nonzero()[0])
        raise ConceptError(f"{what} of which rank {rank} loses {error:.3f} (relative); allowed: up to {max_error:g}, "
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

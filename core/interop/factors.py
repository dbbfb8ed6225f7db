"""Converts deltas to low-rank factors for LoRA files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ..errors import ConceptError
from ..model.deltas import Delta, DeltaKey, Deltas, LowRankDelta, concatenate, weighted_sum

DEFAULT_RANK = 32
DEFAULT_ERROR = 0.05
_HALF_ERROR = 1e-3      # fp16 rounds to 5e-4; a larger error means that values left its range


@dataclass(frozen=True)
class Factors:
    """Low-rank deltas.

    Args:
        deltas: The factors.
        rank: The rank that deltas were truncated to.
        error: Relative error over all truncated deltas: Frobenius norm of the difference / norm of these
            deltas. None if none was truncated.
    """

    deltas: dict[DeltaKey, LowRankDelta]
    rank: int
    error: float | None = None


def low_rank(deltas: Deltas, owner: str, rank: int = DEFAULT_RANK,
             max_error: float = DEFAULT_ERROR) -> Factors:
    """Converts the deltas of a concept to factors. Low-rank deltas are unchanged; sparse ones are truncated
    by an SVD.

    Args:
        owner: Owner of the deltas, for messages.
        rank: Rank for sparse deltas.
        max_error: Largest allowed relative error of sparse deltas, 0 to below 1.

    Raises:
        ConceptError: There is no delta, or the error is too large. The message then names a sufficient rank.
    """
    factors = {key: delta for key, delta in deltas.items() if isinstance(delta, LowRankDelta) and delta.scale}
    sparse = {key: delta for key, delta in deltas.items() if not isinstance(delta, LowRankDelta)}
    cut, error = _cut(sparse, owner, rank, max_error)
    return _not_empty(Factors(factors | cut, rank, error), owner)


def low_rank_sum(parts: Mapping[DeltaKey, Sequence[tuple[float, Delta]]], owner: str, rank: int | None = None,
                 max_error: float = DEFAULT_ERROR) -> Factors:
    """Computes weighted sums of deltas as factors.

    Args:
        parts: Per site and projection, the weights and deltas of a sum, see `routing.weighted_deltas`.
        owner: Owner of the sums, for messages.
        rank: Rank of every sum. None keeps sums of low-rank deltas exact, with concatenated factors, and
            truncates only sparse parts to DEFAULT_RANK.
        max_error: Largest allowed relative error over everything truncated, 0 to below 1.

    Raises:
        ConceptError: As for `low_rank`.
    """
    if rank is not None:
        sums = {key: weighted_sum(list(group)) for key, group in parts.items()}
        small = {key: delta for key, delta in sums.items()
                 if isinstance(delta, LowRankDelta) and delta.down.shape[0] <= rank}
        large = {key: delta for key, delta in sums.items() if key not in small}
        cut, error = _cut(large, owner, rank, max_error, "deltas")
        rest = {key: delta for key, delta in small.items() if delta.scale}
        return _not_empty(Factors(rest | cut, rank, error), owner)
    exact: dict[DeltaKey, list[tuple[float, LowRankDelta]]] = {}
    sparse: dict[DeltaKey, list[tuple[float, Delta]]] = {}
    for key, group in parts.items():
        for weight, delta in group:
            if isinstance(delta, LowRankDelta):
                exact.setdefault(key, []).append((weight, delta))
            else:
                sparse.setdefault(key, []).append((weight, delta))
    cut, error = _cut({key: weighted_sum(group) for key, group in sparse.items()}, owner, DEFAULT_RANK,
                      max_error)
    factors: dict[DeltaKey, LowRankDelta] = {}
    for key in exact | cut:
        side_by_side = [*exact.get(key, ()), *([(1.0, cut[key])] if key in cut else ())]
        narrow = _no_wider(concatenate(side_by_side), f"{owner}: {key[1]} of site {key[0]}")
        if narrow is not None:
            factors[key] = narrow
    return _not_empty(Factors(factors, DEFAULT_RANK, error), owner)


def _not_empty(factors: Factors, owner: str) -> Factors:
    if not factors.deltas:
        raise ConceptError(f"{owner} changes no weights, so there is nothing for a LoRA file to hold; "
                           "allowed: the format 'embedding'")
    return factors


def _no_wider(delta: LowRankDelta, where: str) -> LowRankDelta | None:
    """Reduces a delta's columns to at most the rank of its weight; None for a zero delta."""
    most = min(delta.shape)
    return delta if delta.down.shape[0] <= most else _truncated(delta, most, where)[0]


def _cut(deltas: Deltas, owner: str, rank: int, max_error: float,
         what: str = "sparse deltas") -> tuple[dict[DeltaKey, LowRankDelta], float | None]:
    """Truncates each delta to `rank`. Also returns the overall relative error; None without deltas."""
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
    """Singular value decomposition. Narrow factors are first reduced to an `r x r` matrix by QR."""
    if not isinstance(delta, LowRankDelta) or delta.down.shape[0] >= min(delta.shape):
        return torch.linalg.svd(delta.dense().cpu(), full_matrices=False)
    (q, r), (p, s) = (torch.linalg.qr(side.float().cpu()) for side in (delta.up, delta.down.T))
    left, spectrum, right = torch.linalg.svd(delta.scale * (r @ s.T), full_matrices=False)
    return q @ left, spectrum, right @ p.T


def _truncated(delta: Delta, rank: int, where: str) -> tuple[LowRankDelta | None, Tensor]:
    """The best approximation of the given rank (Eckart and Young, 1936), None for zero, and all singular
    values.
    """
    if not all(torch.isfinite(tensor).all() for tensor in delta.tensors()):
        raise ConceptError(f"{where} holds NaN or infinity; allowed: finite numbers")
    left, spectrum, right = _svd(delta)
    count = min(rank, int((spectrum > 0).sum()))
    root = spectrum[:count].sqrt()       # equal magnitudes keep both factors in fp16's range
    cut = LowRankDelta(left[:, :count] * root, root.unsqueeze(1) * right[:count]) if count else None
    return cut, spectrum.double()


def _check_error(spectra: list[Tensor], what: str, rank: int, max_error: float) -> float:
    longest = max(spectrum.numel() for spectrum in spectra)
    padded = (torch.nn.functional.pad(spectrum**2, (0, longest - spectrum.numel())) for spectrum in spectra)
    energy = reduce(torch.add, padded)
    # lost[r] = energy beyond rank r; summing the tail avoids the cancellation of 1 - head
    lost = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
    errors = (lost / lost[0].clamp_min(1e-300)).sqrt()
    error = float(errors[min(rank, longest)])
    if error > max_error:
        needed = int((errors <= max_error).nonzero()[0])
        raise ConceptError(f"{what} of which rank {rank} loses {error:.3f} (relative); allowed: up to "
                           f"{max_error:g}, which rank {needed} keeps")
    return error


def check_strength(strength: float) -> float:
    """Raises for invalid strengths. 0 is invalid because kohya's programs read `alpha = 0` as 'alpha = rank',
    full strength.
    """
    is_number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
    if not is_number or not math.isfinite(strength) or strength == 0:
        raise ConceptError(f"strength is {strength!r}; allowed: finite numbers other than 0")
    return float(strength)


def compact(tensor: Tensor, name: str) -> Tensor:
    """Converts to float16, as in most LoRA files, or to float32 if values exceed float16's range."""
    exact = tensor.detach().float().cpu().contiguous()
    if not torch.isfinite(exact).all():
        raise ConceptError(f"tensor '{name}' holds NaN or infinity; allowed: finite numbers")
    half = exact.half()
    fits = bool(torch.isfinite(half).all()) and (half.float() - exact).norm() <= _HALF_ERROR * exact.norm()
    return half if fits else exact.clone()

"""Number types of a bank's tensors. Values too large for float16 are stored as float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..errors import ConceptError
from .deltas import DeltaKey, LowRankDelta, SparseDelta

STORED_TYPES = {"float16": torch.float16, "float32": torch.float32}


def stored_dtype(name: str) -> torch.dtype:
    """The torch type of a `stored` setting. Raises ConceptError for an unknown name."""
    if name not in STORED_TYPES:
        raise ConceptError(f"stored type is {name!r}; allowed: {', '.join(STORED_TYPES)}")
    return STORED_TYPES[name]


def wide_enough(dtype: torch.dtype, tensors: Iterable[Tensor]) -> torch.dtype:
    """`dtype`, or float32 if one of the tensors would overflow. All tensors get the same type."""
    tops = [tensor.detach().abs().amax() for tensor in tensors if tensor.numel()]
    return torch.float32 if tops and torch.stack(tops).max() > torch.finfo(dtype).max else dtype


def stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A detached copy on the CPU in the bank's type."""
    return tensor.detach().to(wide_enough(dtype, [tensor])).cpu().clone()


@torch.no_grad()
def load_stored(parameter: Tensor, stored: Tensor, what: str) -> None:
    """Copies a stored tensor into a parameter. Raises ConceptError if their shapes differ."""
    if parameter.shape != stored.shape:
        had, needs = ("x".join(map(str, tensor.shape)) for tensor in (stored, parameter))
        raise ConceptError(f"{what} are {had}, the settings of the method need {needs}; a concept is refined "
                           "with the rank, slots, layers and projections that it was learned with")
    parameter.copy_(stored)


def stored_deltas(deltas: Mapping[DeltaKey, LowRankDelta],
                  dtype: torch.dtype) -> dict[DeltaKey, LowRankDelta]:
    """Detached copies on the CPU, all in one type, as a bank's file requires."""
    dtype = wide_enough(dtype, (tensor for delta in deltas.values() for tensor in delta.tensors()))
    def copied(factor: Tensor) -> Tensor:
        return factor.detach().to(dtype).cpu().clone()

    return {key: LowRankDelta(copied(d.up), copied(d.down), d.scale) for key, d in deltas.items()}


def stored_sparse(deltas: Mapping[DeltaKey, SparseDelta], dtype: torch.dtype) -> dict[DeltaKey, SparseDelta]:
    """As `stored_deltas`, of sparse deltas. The type is that of their values."""
    dtype = wide_enough(dtype, (delta.values for delta in deltas.values()))
    values = {key: delta.values.detach().to(dtype).cpu().clone() for key, delta in deltas.items()}
    return {key: SparseDelta(d.size, d.indices.cpu().clone(), values[key], d.scale)
            for key, d in deltas.items()}

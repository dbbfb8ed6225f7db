"""Comparisons that several test files share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def distance(one: Tensor, reference: Tensor) -> float:
    """Norm of the difference, relative to the reference; 0 = equal."""
    return ((one - reference).norm() / reference.norm()).item()


def equal(one: Mapping[object, Tensor], other: Mapping[object, Tensor]) -> bool:
    """Whether two collections hold the same tensors, bit for bit and in the same types."""
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)


def tensors_of(concept) -> dict[object, Tensor]:
    """Copies of all tensors that a concept stores."""
    deltas = {(*key, n): tensor for key, delta in concept.deltas.items()
              for n, tensor in enumerate(delta.tensors())}
    return {key: tensor.clone() for key, tensor in (deltas | dict(concept.tokens.vectors)).items()}


def same(one, other) -> bool:
    """Whether two concepts store the same tensors."""
    return equal(tensors_of(one), tensors_of(other))

"""The smallest delta that turns given inputs of a projection into given targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .deltas import LowRankDelta


@dataclass(frozen=True)
class Rows:
    """inputs `[s, b]` and targets `[s, a]` of one projection."""

    inputs: Tensor
    targets: Tensor

    @classmethod
    def of(cls, inputs: Tensor, delta: LowRankDelta) -> Rows:
        """The rows of a delta for given inputs."""
        return cls(inputs, delta.apply(inputs))

    @staticmethod
    def stacked(parts: Sequence[Rows]) -> Rows:
        return Rows(torch.cat([p.inputs for p in parts]), torch.cat([p.targets for p in parts]))


def fit(rows: Rows, ridge: float, metric: Tensor | None = None) -> LowRankDelta:
    """Solves for the smallest change that turns inputs into targets: `D = T^T (X P X^T + rho I)^-1 X P`.

    Args:
        rows: X `[s, b]` and T `[s, a]`.
        ridge: rho relative to the mean diagonal of X P X^T.
        metric: P `[b, b]` positive definite, float64; D is smallest in ||D P^-1/2||. None = identity, with
            which D minimises ||X D^T - T||^2 + rho ||D||^2.

    Returns:
        D `[a, b]` of rank min(s, b), in float32, solved in double precision.
    """
    x, t = rows.inputs.double(), rows.targets.double()
    weighted = x if metric is None else x @ metric
    gram = weighted @ x.T
    rho = ridge * gram.diagonal().mean().clamp(min=1e-30)
    if metric is None and len(x) > x.shape[1]:      # push-through identity: the same in the smaller space
        small = x.T @ x
        solved = torch.linalg.solve(small + rho * torch.eye(len(small), dtype=small.dtype), x.T @ t)
        return LowRankDelta(solved.T.float().contiguous(), torch.eye(x.shape[1]))
    solved = torch.linalg.solve(gram + rho * torch.eye(len(gram), dtype=gram.dtype), t)
    return LowRankDelta(solved.T.float().contiguous(), weighted.float().contiguous())

"""The two consolidation losses of CIDM (Dong et al., NeurIPS 2024, Sec. 3.2) in low-rank algebra.

Symbols as in the paper: task g is being learned, i < g are old; dW_i = A_i B_i (`up`, `down`); W* is the
common subspace of all tasks and H_i the projection of task i onto it. All functions are per projection of a
site; callers sum over sites.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.deltas import LowRankDelta
from ..model.known_gradients import with_gradients

RIDGE = 1e-6     # relative to the mean diagonal, keeps the solves defined when factors are still zero


def orthogonality_rr(old_up: Tensor, up: Tensor) -> Tensor:
    """sum |A_i^T A_g|: r×r products of column spaces, as in the cited O-LoRA; our default reading of R1.

    old_up: the A_i of all old tasks side by side `[a, sum r]`, so that no loop over concepts is needed; up:
    `[a, r]`. The gradient for A_g is A sign(A^T A_g).
    """
    with torch.no_grad():
        old = old_up.to(up.dtype)
        overlap = old.T @ up
        gradient = old @ overlap.sign()
    return with_gradients(overlap.abs().sum(), {up: gradient})


def orthogonality_aa(old_up: Tensor, up: Tensor) -> Tensor:
    """sum_i |A_i A_g^T|: R1 as printed, a×a matrices. With A_i of full rank its only zero is A_g = 0.

    old_up: the A_i of all old tasks `[g - 1, a, R]`; up: `[a, r]`. The smaller rank is padded with zeros.
    """
    rank = max(old_up.shape[2], up.shape[1])
    old, new = F.pad(old_up.to(up.dtype), (0, rank - old_up.shape[2])), F.pad(up, (0, rank - up.shape[1]))
    return (old @ new.T).abs().sum()


def orthogonality_released(old_up: Tensor, up: Tensor) -> Tensor:
    """mean |A_i A_g^T| + mean (A_g - 1)^2: what the released code has in place of R1 and R2.

    The second term is not in the paper. It keeps A_g from becoming zero. old_up, up: see `orthogonality_aa`.
    """
    return orthogonality_aa(old_up, up) / (len(old_up) * up.shape[0] ** 2) + (up - 1).square().mean()


def stored_up(delta: LowRankDelta) -> Tensor:
    """A of a stored delta, scale included; in its stored type where that is exact, to save memory."""
    return delta.up if delta.scale == 1 else delta.up.float() * delta.scale


def weighted_rows(delta: LowRankDelta) -> Tensor:
    """C `[r, b]` with C^T C = dW^T dW, so that sums over tasks need no b×b matrix.

    C = (A^T A)^(1/2) B, up to a rotation.
    """
    up, down = delta.up.float() * delta.scale, delta.down.float()
    gram = up.T @ up
    if not torch.isfinite(gram).all():      # a diverged run, which the next loss reports more clearly
        return torch.zeros_like(down)
    values, vectors = torch.linalg.eigh(gram)
    return (values.clamp(min=0).sqrt().unsqueeze(1) * vectors.T) @ down


def _ridged(gram: Tensor) -> Tensor:
    identity = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    return gram + identity * (RIDGE * gram.diagonal().mean().clamp(min=1e-20))


def project_onto(delta_up: Tensor, delta_down: Tensor, basis: Tensor) -> Tensor:
    """M = dW Q^T (Q Q^T)^-1 `[a, s]`: the closed-form H_i W* = M Q for W* with row space Q `[s, b]`."""
    cross = delta_up @ (delta_down @ basis.T)
    return torch.linalg.solve(_ridged(basis @ basis.T), cross.T).T


def residual(delta_up: Tensor, delta_down: Tensor, projected: Tensor, basis: Tensor) -> Tensor:
    """||dW - M Q||_F^2 from r×r, r×s and s×s Gram matrices; the a×b matrix is never built."""
    own = ((delta_up.T @ delta_up) * (delta_down @ delta_down.T)).sum()
    cross = ((delta_up.T @ projected) * (delta_down @ basis.T)).sum()
    common = ((projected.T @ projected) * (basis @ basis.T)).sum()
    return (own - 2 * cross + common).clamp(min=0)      # rounding can leave a little less than nothing


@dataclass(frozen=True)
class Gram:
    """S = sum_i dW_i^T dW_i `[b, b]` of some tasks, as its factors; smaller ranks are padded with zeros.

    downs: the B_i `[g, R, b]` in their stored type, which halves the memory of many concepts; inner: the
    A_i^T A_i `[g, R, R]`.
    """

    downs: Tensor
    inner: Tensor

    @classmethod
    def of(cls, deltas: Sequence[LowRankDelta]) -> Gram:
        rank = max(d.down.shape[0] for d in deltas)
        ups = (d.up.float() * d.scale for d in deltas)
        return cls(torch.stack([F.pad(d.down, (0, 0, 0, rank - d.down.shape[0])) for d in deltas]),
                   torch.stack([F.pad(up.T @ up, (0, rank - up.shape[1]) * 2) for up in ups]))

    def times(self, basis: Tensor) -> Tensor:
        """Q S for Q `[s, b]`."""
        downs = self.downs.flatten(0, 1).to(basis)
        inside = (basis @ downs.T).unflatten(1, self.downs.shape[:2]).transpose(0, 1)      # [g, s, R]
        return (inside @ self.inner).transpose(0, 1).flatten(1) @ downs


def als_sweep(grams: Iterable[Gram], basis: Tensor) -> Tensor:
    """One alternating-least-squares sweep for W*'s row space: all H_i in closed form, then W*.

    With H_i eliminated, W* = K Q S up to an s×s factor, S = sum dW_i^T dW_i. That factor does not change H_i
    W*, so the rows are re-orthonormalised.

    Args:
        grams: of all tasks together.
        basis: Q `[s, b]`, rows orthonormal.

    Returns:
        The new Q.
    """
    updated = sum((gram.times(basis) for gram in grams), torch.zeros_like(basis))
    if not torch.isfinite(updated).all() or updated.norm() < 1e-20:
        return basis
    return torch.linalg.qr(updated.T).Q.T


def initial_basis(rows: Tensor, rank: int) -> Tensor:
    """The `rank` leading right-singular directions of stacked rows: W* after the first task."""
    _, _, right = torch.linalg.svd(rows, full_matrices=False)
    basis = right[:rank]
    if basis.shape[0] < rank:      # fewer directions than asked for: fill with orthogonal ones
        filler = torch.linalg.qr(torch.cat([basis, torch.eye(rows.shape[1]).to(rows)[:rank]]).T).Q.T
        basis = filler[:rank]
    return basis


class LowRankCommon:
    """W* bounded to rank s, as its row space Q `[s, b]` (`basis`), with every H_i in closed form.

    Q starts at the leading directions of the old tasks, unless one of this size is carried over. trained: the
    tensors that `step` changes, the first of which is carried over to the next task.
    """

    trained: ClassVar[tuple[str, ...]] = ("basis",)

    def __init__(self, old: Sequence[LowRankDelta], carried: Tensor | None, rank: int) -> None:
        self.old = Gram.of(old)
        if carried is not None and carried.shape == (rank, old[0].shape[1]):
            self.basis = carried.to(self.old.inner)
        else:
            self.basis = initial_basis(torch.cat([weighted_rows(delta) for delta in old]), rank)

    def loss(self, up: Tensor, down: Tensor) -> Tensor:
        """||dW_g - H_g W*||_F^2, the only part of R2 that reaches dW_g, with H_g and W* held fixed."""
        return residual(up, down, project_onto(up.detach(), down.detach(), self.basis), self.basis)

    def step(self, up: Tensor, down: Tensor, _lr: float) -> None:
        """Step two: one sweep of least squares, in place of the paper's gradient step."""
        self.basis = als_sweep((self.old, Gram.of([LowRankDelta(up, down)])), self.basis)


class DenseCommon:
    """W* `[a, b]` and every H_i `[a, a]` as printed, with the paper's own gradient step on them (Eq. 7).

    The paper does not state the initialisation. Ours: H_g = I, and W* = mean of the old dW_i the first time,
    carried over afterwards. Old H_i are solved again by ridge regression instead of stored (they are a×a
    each). All-zero starts are avoided, because both gradients vanish there. common: W*; projections: H_i
    `[g, a, a]`, the last one is H_g; old: the old dW_i `[g - 1, a, b]`.
    """

    trained: ClassVar[tuple[str, ...]] = ("common", "projections")

    def __init__(self, old: Sequence[LowRankDelta], carried: Tensor | None, _rank: int = 0) -> None:
        self.old = torch.stack([delta.dense() for delta in old])
        common = self.old.mean(0)
        if carried is not None and carried.shape == common.shape:
            common = carried.to(common, copy=True)      # `step` changes it; the bank's stays
        wide = common.double()      # W* W*^T is far from full rank; single precision would drown the ridge
        cross = (self.old.double() @ wide.T).transpose(1, 2)
        solved = torch.linalg.solve(_ridged(wide @ wide.T), cross).transpose(1, 2).to(common)
        self.projections = torch.cat([solved, torch.eye(len(common)).to(common).unsqueeze(0)])
        self.common = common

    def loss(self, up: Tensor, down: Tensor) -> Tensor:
        """As `LowRankCommon.loss`."""
        return (up @ down - self.projections[-1] @ self.common).square().sum()

    @torch.no_grad()
    def step(self, up: Tensor, down: Tensor, lr: float) -> None:
        """Step two: W* and H_i descend R2. The printed update adds the gradients, which would ascend."""
        error = torch.cat([self.old, (up @ down).unsqueeze(0)]) - self.projections @ self.common
        h_gradient = -2 * error @ self.common.T
        w_gradient = -2 * (self.projections.transpose(1, 2) @ error).sum(0)
        self.projections -= lr * h_gradient
        self.common -= lr * w_gradient

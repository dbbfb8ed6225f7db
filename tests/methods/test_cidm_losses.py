"""The consolidation losses of CIDM against their printed forms, written out densely and by loops."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.methods.cidm_losses import (
    DenseCommon,
    Gram,
    als_sweep,
    initial_basis,
    orthogonality_aa,
    orthogonality_rr,
    project_onto,
    residual,
    weighted_rows,
)
from continual_concepts.core.model.deltas import LowRankDelta

A, B, R, S = 7, 9, 2, 3


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tasks(count, rank=R):
    return [LowRankDelta(random(A, rank, seed=10 + i), random(rank, B, seed=20 + i), 0.5 + i)
            for i in range(count)]


def test_rr_is_the_sum_over_concepts():
    ups, up = [random(A, R, seed=i) for i in range(3)], random(A, R, seed=9)
    expected = sum((old.T @ up).abs().sum() for old in ups)
    assert torch.allclose(orthogonality_rr(torch.cat(ups, 1), up), expected)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_rr_has_the_gradient_of_its_formula(stored):
    old, up = random(A, 6).to(stored), random(A, R, seed=9)
    up[:, 1] = 0      # where |x| has no slope
    ours, plain = up.clone().requires_grad_(), up.clone().requires_grad_()
    value, expected = 3 * orthogonality_rr(old, ours), 3 * (old.float().T @ plain).abs().sum()
    assert torch.equal(value, expected)
    value.backward()
    expected.backward()
    assert torch.allclose(ours.grad, plain.grad, rtol=1e-6, atol=1e-6) and ours.grad.any()


def test_rr_keeps_nothing_of_the_old_concepts_size():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        orthogonality_rr(random(A, 400).half(), random(A, R).requires_grad_())
    assert kept and max(kept) <= A * R


def test_rr_is_zero_for_orthogonal_column_spaces_only():
    basis = torch.linalg.qr(random(A, A)).Q
    old = basis[:, :3] @ random(3, 6, seed=1)
    assert orthogonality_rr(old, basis[:, 3:] @ random(4, R, seed=2)) < 1e-4
    assert orthogonality_rr(old, basis[:, 2:4]) > 0.1


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 2, 2), (2, 2, 1), (3, 1, 2)])
def test_aa_is_the_printed_formula(ranks):
    """Factors of a smaller rank are filled up with zero columns."""
    *old, up = [random(A, rank, seed=i) for i, rank in enumerate(ranks)]

    def filled(matrix, to):
        return torch.cat([matrix, torch.zeros(A, to - matrix.shape[1])], 1)

    expected = 0.0
    for one in old:
        for i in range(A):
            for j in range(A):
                expected += abs(float(filled(one, 3)[i] @ filled(up, 3)[j]))
    widest = max(one.shape[1] for one in old)
    assert float(orthogonality_aa(torch.stack([filled(one, widest) for one in old]),
                                  up)) == pytest.approx(expected, rel=1e-5)


def test_aa_is_zero_only_for_nothing():
    old = random(1, A, R)
    assert orthogonality_aa(old, torch.zeros(A, R)) == 0
    orthogonal = torch.linalg.qr(torch.cat([old[0], random(A, 2, seed=5)], 1)).Q[:, 2:]
    assert orthogonality_rr(old[0], orthogonal) < 1e-4 < 1 < orthogonality_aa(old, orthogonal)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_weighted_rows_have_the_gram_matrix_of_the_delta(rank):
    delta = LowRankDelta(random(A, rank), random(rank, B, seed=1), 0.7)
    rows, dense = weighted_rows(delta), delta.dense()
    assert rows.shape == (rank, B) and torch.allclose(rows.T @ rows, dense.T @ dense, atol=1e-4)
    assert not weighted_rows(LowRankDelta(torch.zeros(A, rank), random(rank, B))).any()


@pytest.mark.parametrize("rows", [1, S, B])
def test_projecting_is_dense_ridge_regression(rows):
    basis, up, down = random(rows, B, seed=3), random(A, R), random(R, B, seed=1)
    ridge = 1e-6 * (basis @ basis.T).diagonal().mean() * torch.eye(rows)
    expected = (up @ down) @ basis.T @ torch.linalg.inv(basis @ basis.T + ridge)
    assert torch.allclose(project_onto(up, down, basis), expected, atol=1e-3)


def test_the_residual_is_the_dense_norm_with_its_gradients():
    basis, projected = random(S, B, seed=3), random(A, S, seed=4)
    up, down = random(A, R).requires_grad_(), random(R, B, seed=1).requires_grad_()
    value, dense = residual(up, down, projected, basis), (up @ down - projected @ basis).square().sum()
    assert torch.allclose(value, dense, rtol=1e-5)
    for ours, expected in zip(torch.autograd.grad(value, (up, down)), torch.autograd.grad(dense, (up, down)),
                              strict=True):
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_residual_is_never_negative():
    basis = torch.linalg.qr(random(B, S)).Q.T
    for seed in range(50):
        up, down = 100 * random(A, R, seed=seed), random(R, S, seed=seed) @ basis
        assert residual(up, down, project_onto(up, down, basis), basis) >= 0


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("ranks", [(2,), (2, 2, 2), (1, 3, 2)])
def test_the_gram_is_the_sum_of_the_dense_ones(ranks, stored):
    """Whatever the tasks' ranks, scales and stored types, and without changing what is stored."""
    deltas = [LowRankDelta(random(A, rank, seed=i).to(stored), random(rank, B, seed=9 + i).to(stored),
                           0.5 + i)
              for i, rank in enumerate(ranks)]
    gram, basis = Gram.of(deltas), random(S, B, seed=3)
    dense = sum(d.dense().T @ d.dense() for d in deltas)
    assert gram.downs.dtype == stored
    assert torch.allclose(gram.times(basis), basis @ dense, rtol=1e-4, atol=1e-4)


def test_a_sweep_is_that_over_all_rows():
    """In whichever grams the tasks come."""
    deltas, basis = tasks(4), torch.linalg.qr(random(B, S)).Q.T
    rows = torch.cat([weighted_rows(d) for d in deltas])
    expected = torch.linalg.qr((basis @ rows.T @ rows).T).Q.T
    for grams in ([Gram.of(deltas)], [Gram.of(deltas[:3]), Gram.of(deltas[3:])]):
        assert torch.allclose(als_sweep(grams, basis), expected, atol=1e-5)


@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_a_sweep_over_numbers_that_are_none_keeps_the_basis(wrong):
    basis = initial_basis(random(R, B), S)
    assert torch.equal(als_sweep([Gram.of([LowRankDelta(random(A, R) * wrong, random(R, B))])], basis), basis)


def total_residual(deltas, basis) -> float:
    """sum_i min_H ||dW_i - H W*||^2, every H in closed form."""
    space = torch.linalg.qr(basis.T).Q
    return float(sum((d.dense() - d.dense() @ space @ space.T).square().sum() for d in deltas))


@pytest.mark.parametrize("count", [1, 3, 6])
def test_sweeps_never_raise_the_total_residual_and_find_the_best_subspace(count):
    deltas = tasks(count)
    grams = [Gram.of(deltas)]
    basis, history = torch.linalg.qr(random(B, S)).Q.T, []
    for _ in range(60):
        history.append(total_residual(deltas, basis))
        basis = als_sweep(grams, basis)
        assert torch.allclose(basis @ basis.T, torch.eye(S), atol=1e-5)
    assert all(after <= before * (1 + 1e-5) + 1e-4
               for before, after in zip(history, history[1:], strict=False))
    best = float(torch.linalg.svdvals(torch.cat([d.dense() for d in deltas]))[S:].square().sum())
    assert history[-1] == pytest.approx(best, rel=0.05, abs=1e-3)


def test_a_sweep_over_nothing_keeps_the_basis():
    basis = initial_basis(random(R, B), S)
    assert torch.equal(als_sweep([Gram.of([LowRankDelta(torch.zeros(A, R), random(R, B))])], basis), basis)


@pytest.mark.parametrize("rank", [1, 2, 5, B])
def test_the_initial_basis_is_orthonormal_and_holds_the_rows(rank):
    rows = random(R, B)
    basis = initial_basis(rows, rank)
    assert basis.shape == (rank, B) and torch.allclose(basis @ basis.T, torch.eye(rank), atol=1e-5)
    if rank >= R:
        assert torch.allclose(rows @ basis.T @ basis, rows, atol=1e-5)


@pytest.fixture
def dense():
    return DenseCommon(tasks(2), None), factors(tasks(3)[2])


def factors(delta):
    return delta.scale * delta.up, delta.down


def r2(dense, projections, common, up, down):
    """R2 = sum_{i<=g} ||dW_i - H_i W*||_F^2."""
    deltas = torch.cat([dense.old, (up @ down).unsqueeze(0)])
    return (deltas - projections @ common).square().sum()


def test_dense_starts_as_documented(dense):
    common, new = dense
    assert torch.allclose(common.common,
                          common.old.mean(0)) and torch.equal(common.projections[-1], torch.eye(A))
    assert torch.allclose(r2(common, common.projections, common.common, *new), common.loss(*new) + sum(
        (old - h @ common.common).square().sum()
        for old, h in zip(common.old, common.projections, strict=False)), rtol=1e-5)


def test_the_printed_gradients_are_autograds_and_a_small_step_descends(dense):
    common, new = dense
    projections, shared, lr = common.projections.clone(), common.common.clone(), 1e-4
    leaves = projections.clone().requires_grad_(), shared.clone().requires_grad_()
    before = r2(common, *leaves, *new)
    h_gradient, w_gradient = torch.autograd.grad(before, leaves)
    common.step(*new, lr)
    assert torch.allclose(common.projections, projections - lr * h_gradient, atol=1e-5)
    assert torch.allclose(common.common, shared - lr * w_gradient, atol=1e-5)
    assert r2(common, common.projections, common.common, *new) < before


def test_dense_steps_leave_the_given_common_subspace_alone():
    given = random(A, B)
    common = DenseCommon(tasks(2), given)
    common.step(*factors(tasks(3)[2]), 0.1)
    assert torch.equal(given, random(A, B)) and not torch.equal(common.common, given)


def test_dense_projections_stay_bounded_where_the_common_subspace_has_low_rank():
    """W* W*^T is singular: in single precision a plain solve gives projections that make the step diverge."""
    for seed in range(20):
        delta = LowRankDelta(0.01 * random(32, 4, seed=seed), random(4, 32, seed=seed + 1))
        common = DenseCommon([delta], delta.dense())
        assert torch.linalg.matrix_norm(common.projections, 2).max() < 1.1

"""Least squares of projections: closed forms against brute force."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.model.least_squares import Rows, fit


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [3, 20])
def test_the_ridge_fit_is_the_minimum(count):
    """The gradient of ||X D^T - T||^2 + rho ||D||^2 is zero at D, below and above the width."""
    rows, ridge = Rows(random(count, 6), random(count, 5, seed=1)), 0.1
    delta = fit(rows, ridge)
    assert delta.up.shape[1] == min(count, 6)
    d = delta.dense().double().requires_grad_()
    x, t = rows.inputs.double(), rows.targets.double()
    rho = ridge * (x @ x.T).diagonal().mean()
    ((x @ d.T - t).square().sum() + rho * d.square().sum()).backward()
    assert d.grad.abs().max() < 1e-5 < d.abs().max()


def test_a_metric_chooses_among_exact_solutions():
    """D X^T = T exactly, and tr(D G D^T) is smallest: every feasible direction is G-orthogonal to D."""
    rows, features = Rows(random(3, 8), random(3, 5, seed=1)), random(20, 8, seed=2).double()
    gram = features.T @ features
    d = fit(rows, 1e-12, torch.linalg.inv(gram)).dense().double()
    assert torch.allclose(d @ rows.inputs.double().T, rows.targets.double().T, atol=1e-4)
    null = torch.linalg.svd(rows.inputs.double(), full_matrices=True)[2][3:]      # X null^T = 0
    assert (d @ gram @ null.T).abs().max() < 1e-3
    plain = fit(rows, 1e-12).dense().double()
    assert (d @ features.T).norm() < 0.99 * (plain @ features.T).norm()


def test_repeated_and_empty_rows_do_no_harm():
    rows = Rows(random(2, 6), random(2, 5, seed=1))
    once = fit(rows, 1e-8).dense()
    twice = fit(Rows.stacked([rows, rows, Rows(torch.zeros(1, 6), torch.zeros(1, 5))]), 1e-8).dense()
    assert torch.allclose(once, twice, atol=1e-4)
    assert fit(Rows(torch.zeros(2, 6), torch.zeros(2, 5)), 1e-3).dense().abs().max() == 0

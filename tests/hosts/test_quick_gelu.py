"""CLIP's activation against its formula and autograd's gradient of that."""

from __future__ import annotations

import pytest
import torch

from continual_concepts.core.hosts.quick_gelu import quick_gelu


def plain(x):
    return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_the_formulas_bit_for_bit(dtype):
    x = torch.linspace(-30, 30, 4001).to(dtype)
    assert torch.equal(quick_gelu(x), plain(x))


def test_the_gradient_is_autograds():
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([-1e4, 0.0, 1e4])])
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    (weights * quick_gelu(ours)).sum().backward()
    (weights * plain(theirs)).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_the_differences():
    x = torch.linspace(-4, 4, 20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(quick_gelu, x)


def test_only_what_came_in_is_kept():
    x, kept = torch.ones(8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        quick_gelu(x)
    assert len(kept) == 1 and kept[0].data_ptr() == x.data_ptr()

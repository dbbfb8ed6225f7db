"""CLIP's activation with a lean backward pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _QuickGELU(torch.autograd.Function):
    """Keeps x alone for the backward pass. Autograd would keep three tensors of its size per layer: with
    layer-wise words, most of the memory of a text encoder."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (1.702 * x).sigmoid_().mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        """x sigmoid(1.702 x) = SiLU(1.702 x) / 1.702, and torch computes the derivative of SiLU in one pass
        over memory."""
        x, = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient, 1.702 * x)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), element by element; bit for bit what the hosts compute."""
    return _QuickGELU.apply(x)

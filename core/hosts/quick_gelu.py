"""CLIP's activation with a lean backward pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _QuickGELU(torch.autograd.Function):
    """Of x alone, in place wherever that is possible: autograd would keep three tensors of x's size for each layer until the backward pass,
    which for layer-wise words is most of what a text encoder keeps."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (1.702 * x).sigmoid_().mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        """s + 1.702 x s (1 - s), s = sigmoid(1.702 x)."""
        x, = ctx.saved_tensors
        s = (1.702 * x).sigmoid_()
        return (1 - s).mul_(x).mul_(1.702).add_(1).mul_(s).mul_(gradient)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), bit for bit what the hosts compute."""
    return _QuickGELU.apply(x)

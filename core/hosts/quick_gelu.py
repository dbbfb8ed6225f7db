"""CLIP's activation with a memory-saving backward pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _QuickGELU(torch.autograd.Function):
    """Stores only x for the backward pass. Autograd would store three tensors of this size per layer, which
    is most of a text encoder's memory with layer-wise words.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (1.702 * x).sigmoid_().mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        """Uses x sigmoid(1.702 x) = SiLU(1.702 x) / 1.702, because torch computes the derivative of SiLU in
        one pass over memory.
        """
        x, = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient, 1.702 * x)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), element by element, bit-identical to the hosts' activation."""
    return _QuickGELU.apply(x)

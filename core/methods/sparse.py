"""Sparse trainables: a few entries of frozen weights, for the methods that choose which."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.backbone import AttentionProcessor
from ..model.deltas import DeltaKey, SparseDelta
from ..model.sites import Site, SiteLayout
from ..neurons.neurons import NeuronSelection
from .base import adapter_key, wide_enough


class _SparseLinear(torch.autograd.Function):
    """`x D^T` for a sparse D `[a, b]`. It is filled for the product, there and back, and never kept: at these densities the quickest way,
    and no site's dense matrix outlives its own call."""

    @staticmethod
    def forward(ctx, x: Tensor, values: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, values, places)
        ctx.size = size
        return F.linear(x, _filled(values, places, size).to(x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        x, values, places = ctx.saved_tensors
        g = gradient.float()
        grad_x = (g @ _filled(values, places, ctx.size)).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_values = (g.flatten(0, -2).T @ x.float().flatten(0, -2)).flatten()[places.long()] if ctx.needs_input_grad[1] else None
        return grad_x, grad_values, None, None


def _filled(values: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
    flat = torch.zeros(size[0] * size[1], dtype=values.dtype, device=values.device)
    return flat.index_put_((places.long(),), values).view(size)


class SparseAdapters(nn.Module):
    """Trainable values `[k]` fp32 and their places int32 `[k]` in each weight. How many there are is fixed before which they are."""

    def __init__(self, layout: SiteLayout, counts: Mapping[DeltaKey, int], device) -> None:
        super().__init__()
        self.sizes = {key: layout.sites[key[0]].shape(key[1]) for key in counts}
        self.values, self.places = nn.ParameterDict(), nn.Module()
        for key, count in counts.items():
            self.values[adapter_key(*key)] = nn.Parameter(torch.zeros(count, device=device))
            self.places.register_buffer(adapter_key(*key), torch.zeros(count, dtype=torch.int32, device=device))

    def place(self, selection: NeuronSelection) -> None:
        for key in self.sizes:
            getattr(self.places, adapter_key(*key)).copy_(selection.indices[key])

    def at(self, key: DeltaKey) -> tuple[Tensor, Tensor]:
        """Values and places of one weight."""
        return self.values[adapter_key(*key)], getattr(self.places, adapter_key(*key))

    def stored(self, dtype: torch.dtype) -> dict[DeltaKey, SparseDelta]:
        """Detached copies on the CPU in the bank's type."""
        found = {key: self.at(key) for key in self.sizes}
        dtype = wide_enough(dtype, (values for values, _ in found.values()))
        return {key: SparseDelta(self.sizes[key], places.cpu().clone(), values.detach().to(dtype).cpu().clone())
                for key, (values, places) in found.items()}

    def selection(self) -> NeuronSelection:
        return NeuronSelection({key: self.at(key)[1] for key in self.sizes}, self.sizes)


class SparseProgram(AttentionProcessor):
    """Adds the sparse deltas to the projections while training."""

    def __init__(self, adapters: SparseAdapters) -> None:
        self.adapters = adapters

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        key = (site.index, projection)
        if key not in self.adapters.sizes:
            return y
        return y + _SparseLinear.apply(x, *self.adapters.at(key), self.adapters.sizes[key]).to(y.dtype)

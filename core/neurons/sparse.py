"""Sparse trainable deltas of selected entries of frozen weights, for methods that select neurons."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.adapters import Adapters, adapter_key
from ..model.deltas import DeltaKey, SparseDelta
from ..model.sites import SiteLayout
from ..model.storage import stored_sparse
from .neurons import NeuronSelection


class SparseLinear(torch.autograd.Function):
    """`x D^T` for a sparse D `[a, b]`.

    The dense D is built for the product in both passes and not stored. At these densities this is the fastest
    way, and no dense matrix stays in memory after its site's call.
    """

    @staticmethod
    def forward(ctx, x: Tensor, values: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, values, places)
        ctx.size = size
        return F.linear(x, _filled(values, places, size).to(x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, values, places = ctx.saved_tensors
        g, of_x, of_values = gradient.float(), None, None
        if ctx.needs_input_grad[0]:
            of_x = (g @ _filled(values, places, ctx.size)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            of_values = (g.flatten(0, -2).T @ x.float().flatten(0, -2)).flatten()[places.long()]
        return of_x, of_values, None, None


def _filled(values: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
    flat = torch.zeros(size[0] * size[1], dtype=values.dtype, device=values.device)
    return flat.index_put_((places.long(),), values).view(size)


class SparseAdapters(Adapters):
    """A pool of trainable values float32 and their flat indices int32. A selection divides it among weights.

    Args:
        layout: The sites of the base.
        counts: Candidate weights; the pool is as large as their counts together.
        device: Where the pool is.

    Attributes:
        all_sizes, sizes: Weight -> (a, b), of all candidates and of the selected weights.
        slices: Selected weight -> its slice of the pool.
    """

    pool_places: Tensor

    def __init__(self, layout: SiteLayout, counts: Mapping[DeltaKey, int],
                 device: torch.device | str) -> None:
        super().__init__()
        self.all_sizes = {key: layout.sites[key[0]].shape(key[1]) for key in counts}
        budget = sum(counts.values())
        self.pool = nn.Parameter(torch.zeros(budget, device=device))
        self.register_buffer("pool_places", torch.zeros(budget, dtype=torch.int32, device=device))
        self._divide({})

    def _divide(self, counts: Mapping[DeltaKey, int]) -> None:
        self.sizes, start = {key: self.all_sizes[key] for key in counts}, 0
        self.slices: dict[DeltaKey, slice] = {}
        for key, count in counts.items():
            self.slices[key] = slice(start, start + count)
            start += count

    def place(self, selection: NeuronSelection) -> None:
        """Sets the indices to those of a selection that is no larger than the pool."""
        self._divide({key: places.numel() for key, places in selection.indices.items() if places.numel()})
        for key, where in self.slices.items():
            self.pool_places[where] = selection.indices[key].to(self.pool_places)

    def at(self, key: DeltaKey) -> tuple[Tensor, Tensor]:
        """Values and indices of one weight."""
        return self.pool[self.slices[key]], self.pool_places[self.slices[key]]

    def change(self, key: DeltaKey, x: Tensor) -> Tensor | None:
        return SparseLinear.apply(x, *self.at(key), self.sizes[key]) if key in self.sizes else None

    def stored(self, dtype: torch.dtype) -> dict[DeltaKey, SparseDelta]:
        entries = {key: self.at(key) for key in self.sizes}
        return stored_sparse({key: SparseDelta(self.sizes[key], places, values)
                              for key, (values, places) in entries.items()}, dtype)

    def selection(self) -> NeuronSelection:
        return NeuronSelection({key: self.at(key)[1] for key in self.sizes}, self.sizes)

    def get_extra_state(self) -> dict[str, int]:
        return {adapter_key(*key): where.stop - where.start for key, where in self.slices.items()}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self._divide({key: int(state[adapter_key(*key)]) for key in self.all_sizes
                      if adapter_key(*key) in state})

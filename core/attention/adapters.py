"""Trainable deltas of the sites' projections, and the attention processor that adds them while training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConceptError
from ..model.deltas import DeltaKey, Deltas, LowRankDelta
from ..model.processor import AttentionProcessor
from ..model.sites import PROJECTIONS, Site, SiteLayout
from ..model.storage import load_stored, stored_deltas, wide_enough


def adapter_key(index: int, projection: str) -> str:
    """A projection's name in parameter dictionaries, checkpoints and shared state: `3-to_k`."""
    return f"{index}-{projection}"


T = TypeVar("T")


def by_name(values: Mapping[DeltaKey, T]) -> dict[str, T]:
    """Values of projections by `adapter_key`."""
    return {adapter_key(*key): value for key, value in values.items()}


def by_key(named: Mapping[str, Tensor], device: torch.device | str) -> dict[DeltaKey, Tensor]:
    """Tensors of a checkpoint, named by `adapter_key`, by projection and on a device."""
    keys = {name: name.split("-") for name in named}
    return {(int(index), projection): named[name].to(device) for name, (index, projection) in keys.items()}


class Change(Protocol):
    """What `AdapterProcessor` adds."""

    def change(self, key: DeltaKey, x: Tensor) -> Tensor | None:
        """What a projection's output gains for the input x `[..., b]`: `[..., a]`, None for nothing."""


class Adapters(nn.Module):
    """Trainable deltas of some projections."""

    @abstractmethod
    def change(self, key: DeltaKey, x: Tensor) -> Tensor | None:
        """See `Change`."""

    @abstractmethod
    def stored(self, dtype: torch.dtype) -> Deltas:
        """Detached copies on the CPU in the bank's type."""

    def load(self, deltas: Deltas) -> None:
        """Sets the parameters to stored deltas. Raises ConceptError if they do not fit, or are of adapters
        that cannot be set."""
        raise ConceptError("these deltas cannot be learned further")


def _check_places(deltas: Deltas, places: Collection[DeltaKey]) -> None:
    """Raises ConceptError unless there are stored deltas of these projections, and of no others."""
    other = sorted(set(deltas) ^ set(places))
    if other:
        site, projection = other[0]
        has, adapts = ("has a", "do not") if other[0] in deltas else ("has no", "do")
        raise ConceptError(f"the concept {has} delta of {projection} at site {site}; the settings of the "
                           f"method {adapts} adapt it")


class NoAdapters(Adapters):
    """No trainable deltas."""

    def change(self, key: DeltaKey, x: Tensor) -> None:
        return None

    def stored(self, dtype: torch.dtype) -> Deltas:
        return {}

    def load(self, deltas: Deltas) -> None:
        _check_places(deltas, ())


class LowRankAdapters(Adapters):
    """Trainable factors: `down` `[r, b]` is initialised Kaiming-uniform, `up` `[a, r]` zero, so training
    starts from the base.

    keys: the adapted projections, in the order of the sites.
    """

    def __init__(self, layout: SiteLayout, rank: int, scale: float, generator: torch.Generator,
                 device: torch.device | str, projections: Sequence[str] = PROJECTIONS) -> None:
        super().__init__()
        self.scale = scale
        self.keys = [(site.index, projection) for site in layout.sites for projection in projections]
        self.up, self.down = nn.ParameterDict(), nn.ParameterDict()
        for index, projection in self.keys:
            a, b = layout.sites[index].shape(projection)
            bound = (1.0 / b) ** 0.5     # kaiming_uniform_(a=sqrt(5)) of an [r, b] matrix
            down = (torch.rand(rank, b, generator=generator) * 2 - 1) * bound
            self.down[adapter_key(index, projection)] = nn.Parameter(down.to(device))
            self.up[adapter_key(index, projection)] = nn.Parameter(torch.zeros(a, rank, device=device))

    def delta(self, key: DeltaKey) -> LowRankDelta:
        """The delta of one projection, with gradient. Raises KeyError if the projection is not adapted."""
        name = adapter_key(*key)
        return LowRankDelta(self.up[name], self.down[name], self.scale)

    def deltas(self) -> dict[DeltaKey, LowRankDelta]:
        """All deltas, with gradient."""
        return {key: self.delta(key) for key in self.keys}

    def scaled(self, key: DeltaKey) -> tuple[Tensor, Tensor]:
        """The papers' A `[a, r]`, scale included, and B `[r, b]` of one projection, with gradient."""
        delta = self.delta(key)
        return delta.up * delta.scale, delta.down

    def change(self, key: DeltaKey, x: Tensor) -> Tensor | None:
        return self.delta(key).apply(x) if adapter_key(*key) in self.up else None

    def stored(self, dtype: torch.dtype) -> dict[DeltaKey, LowRankDelta]:
        return stored_deltas(self.deltas(), dtype)

    def load(self, deltas: Deltas) -> None:
        _check_places(deltas, self.keys)
        for (index, projection), delta in deltas.items():
            name = adapter_key(index, projection)
            if not isinstance(delta, LowRankDelta) or delta.scale != self.scale:
                raise ConceptError(f"the delta of {projection} at site {index} has scale {delta.scale:g}; "
                                   f"the settings of the method need a low-rank one of scale {self.scale:g}")
            for factors, stored in ((self.up, delta.up), (self.down, delta.down)):
                load_stored(factors[name], stored, f"the factors of {projection} at site {index}")


class FullAdapters(Adapters):
    """A trainable full-rank difference `[a, b]` per weight, zero at the start."""

    def __init__(self, layout: SiteLayout, keys: Sequence[DeltaKey], device: torch.device | str) -> None:
        super().__init__()
        self.keys = keys
        shapes = {adapter_key(index, part): layout.sites[index].shape(part) for index, part in self.keys}
        zeros = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        self.differences = nn.ParameterDict({name: nn.Parameter(zero) for name, zero in zeros.items()})

    def at(self, key: DeltaKey) -> Tensor:
        return self.differences[adapter_key(*key)]

    def change(self, key: DeltaKey, x: Tensor) -> Tensor | None:
        return F.linear(x, self.at(key).to(x)) if adapter_key(*key) in self.differences else None

    def stored(self, dtype: torch.dtype) -> dict[DeltaKey, LowRankDelta]:
        """The exact differences in the bank's type, as factors: `up` `[a, b]` and `down` the identity."""
        dtype = wide_enough(dtype, (self.at(key) for key in self.keys))
        exact = {key: self.at(key).detach().to(dtype).cpu().clone() for key in self.keys}
        return {key: LowRankDelta(up, torch.eye(up.shape[1], dtype=dtype)) for key, up in exact.items()}


class AdapterProcessor(AttentionProcessor):
    """Adds trainable deltas to the projections while training."""

    def __init__(self, *adapters: Change) -> None:
        self.adapters = adapters

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        for adapters in self.adapters:
            change = adapters.change((site.index, projection), x)
            y = y if change is None else y + change.to(y.dtype)
        return y

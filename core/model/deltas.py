"""Deltas: changes that a concept adds to the projections of the sites, low rank or sparse, and its slots."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConceptError
from .sites import PROJECTIONS, Site, SiteLayout
from .slots import SLOTS, SlotDelta

DeltaKey = tuple[int, str]     # (site index, projection), or (site index, SLOTS)
# a sparse entry needs an index and a value: twice the memory of a factor's entry
SPARSE_SIZE = 2


@dataclass(frozen=True)
class LowRankDelta:
    """`scale * up @ down`, with up `[a, r]` and down `[r, b]` (A and B in the papers)."""

    up: Tensor
    down: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(a, b)."""
        return self.up.shape[0], self.down.shape[1]

    def dense(self) -> Tensor:
        """The matrix `[a, b]`, float32."""
        return self.scale * (self.up.float() @ self.down.float())

    def apply(self, x: Tensor) -> Tensor:
        """The delta's output for the projection's input: x `[..., b]` to `[..., a]`, in the type of x."""
        return self.scale * F.linear(F.linear(x, self.down.to(x)), self.up.to(x))

    def scaled(self, weight: float) -> LowRankDelta:
        return LowRankDelta(self.up, self.down, self.scale * weight)

    def beside(self, other: LowRankDelta) -> LowRankDelta:
        """The sum with a delta of the same scale, their factors side by side."""
        return LowRankDelta(torch.cat([self.up, other.up], dim=1), torch.cat([self.down, other.down], dim=0),
                            self.scale)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.up, self.down

    def to(self, device=None, dtype=None) -> LowRankDelta:
        return LowRankDelta(self.up.to(device, dtype), self.down.to(device, dtype), self.scale)


@dataclass(frozen=True)
class SparseDelta:
    """Changes a few entries of a weight `[a, b]` by `scale * values`, at the flat `indices` (int32). `size`
    is (a, b).
    """

    size: tuple[int, int]
    indices: Tensor
    values: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    def dense(self) -> Tensor:
        flat = torch.zeros(self.size[0] * self.size[1], dtype=torch.float32, device=self.values.device)
        flat[self.indices.long()] = self.scale * self.values.float()
        return flat.view(self.size)

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense().to(x))

    def scaled(self, weight: float) -> SparseDelta:
        return SparseDelta(self.size, self.indices, self.values, self.scale * weight)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.indices, self.values

    def to(self, device=None, dtype=None) -> SparseDelta:
        return SparseDelta(self.size, self.indices.to(device), self.values.to(device, dtype), self.scale)


Delta = LowRankDelta | SparseDelta | SlotDelta
Deltas = Mapping[DeltaKey, Delta]


def check_fits(deltas: Deltas, layout: SiteLayout, owner: str) -> None:
    """Raises ConceptError unless every delta has the shape of its projection."""
    for (index, projection), delta in deltas.items():
        if not 0 <= index < len(layout):
            raise ConceptError(f"{owner} has a delta for site {index}; this base has {layout.describe()}")
        if projection == SLOTS:
            _check_slots(delta, layout.sites[index], owner)
            continue
        wanted = layout.sites[index].shape(projection)
        if tuple(delta.shape) != wanted:
            raise ConceptError(f"{owner} has a {delta.shape[0]}x{delta.shape[1]} delta for {projection} of "
                               f"site {index}; this base needs {wanted[0]}x{wanted[1]}")


def _check_slots(delta: Delta, site: Site, owner: str) -> None:
    width = site.width
    if not delta.shape[0]:
        raise ConceptError(f"{owner} has no slots at site {site.index}, but a record of them; allowed: 1 or "
                           "more")
    if not isinstance(delta, SlotDelta) or delta.key.shape != delta.value.shape or delta.shape[1] != width:
        raise ConceptError(f"{owner} has slots of width {delta.shape[1]} at site {site.index}; this base "
                           f"needs {width}, for keys and values alike")


def projected(deltas: Deltas) -> Deltas:
    """Without slots: the deltas of projections."""
    return {key: delta for key, delta in deltas.items() if key[1] != SLOTS}


def only_low_rank(deltas: Deltas) -> dict[DeltaKey, LowRankDelta]:
    """Keeps only the low-rank deltas."""
    return {key: delta for key, delta in deltas.items() if isinstance(delta, LowRankDelta)}


def concatenate(parts: Iterable[tuple[float, LowRankDelta]]) -> LowRankDelta:
    """Weighted sum of low-rank deltas as one delta; the ranks add up. Builds no `[a, b]` matrix."""
    scaled = [(weight * delta.scale, delta) for weight, delta in parts]
    up = torch.cat([delta.up.float() * weight for weight, delta in scaled], dim=1)
    return LowRankDelta(up, torch.cat([delta.down.float() for _, delta in scaled], dim=0))


def weighted_sum(parts: list[tuple[float, Delta]]) -> Delta:
    """Weighted sum of deltas of one projection.

    Any number of low-rank deltas costs one product of their concatenated factors. The sum stays low rank
    while that takes less memory than a sparse delta.
    """
    if len(parts) == 1:
        return parts[0][1].scaled(parts[0][0])
    a, b = parts[0][1].shape
    factors = [(weight, delta) for weight, delta in parts if isinstance(delta, LowRankDelta)]
    if factors:
        summed = concatenate(factors)
        if len(factors) == len(parts) and summed.up.shape[1] * (a + b) < SPARSE_SIZE * a * b:
            return summed
        total = summed.dense()
    else:
        total = torch.zeros(a, b, device=parts[0][1].tensors()[-1].device)
    for weight, delta in parts:
        if isinstance(delta, SparseDelta):
            total += weight * delta.dense()
    indices = total.flatten().nonzero().squeeze(1)
    return SparseDelta((a, b), indices.int(), total.flatten()[indices])


def pack(deltas: Deltas, layout: SiteLayout) -> tuple[dict[str, Tensor], dict]:
    """Packs the deltas of a concept into a few tensors, which keeps the header short in a file of 1,000
    concepts.

    Returns:
        Tensors by name, the factors of all sites side by side: `to_q.up` `[sum a, r]` and `to_q.down` `[r,
            sum b]`, or `to_k.indices` and `to_k.values`. Also the JSON that `unpack` needs.

    Raises:
        ConceptError: The deltas of a projection mix forms or ranks, or do not fit the layout.
    """
    tensors: dict[str, Tensor] = {}
    notes: dict[str, dict] = {}
    for projection in (*PROJECTIONS, SLOTS):
        sites = sorted(index for index, name in deltas if name == projection)
        if not sites:
            continue
        present = [deltas[index, projection] for index in sites]
        low_rank = [delta for delta in present if isinstance(delta, LowRankDelta)]
        sparse = [delta for delta in present if isinstance(delta, SparseDelta)]
        if low_rank and sparse:
            raise ConceptError(f"the deltas of {projection} mix low rank and sparse; allowed: "
                               "one form per projection")
        notes[projection] = {"sites": sites, "scale": [float(delta.scale) for delta in present]}
        if projection == SLOTS:
            tensors |= _packed_slots([delta for delta in present if isinstance(delta, SlotDelta)])
        elif low_rank:
            ranks = {delta.up.shape[1] for delta in low_rank}
            if len(ranks) > 1:
                raise ConceptError(f"the deltas of {projection} have ranks {sorted(ranks)}; allowed: "
                                   "one rank per projection")
            tensors[f"{projection}.up"] = torch.cat([delta.up for delta in low_rank], dim=0)
            tensors[f"{projection}.down"] = torch.cat([delta.down for delta in low_rank], dim=1)
        else:
            notes[projection]["counts"] = [delta.indices.numel() for delta in sparse]
            tensors[f"{projection}.indices"] = torch.cat([delta.indices.int() for delta in sparse])
            tensors[f"{projection}.values"] = torch.cat([delta.values for delta in sparse])
    check_fits(deltas, layout, "the concept")
    return tensors, notes


def unpack(tensors: Mapping[str, Tensor], notes: dict, layout: SiteLayout) -> dict[DeltaKey, Delta]:
    """Inverse of `pack`. Raises ConceptError if tensors and JSON disagree."""
    deltas: dict[DeltaKey, Delta] = {}
    for projection, note in notes.items():
        if any(not 0 <= i < len(layout)
               for i in note["sites"]) or len(set(note["sites"])) < len(note["sites"]):
            raise ConceptError(f"the deltas of {projection} are for sites {note['sites']}; allowed: "
                               f"each of 0 to {len(layout) - 1} once")
        scales = [float(scale) for scale in note["scale"]]
        if not all(map(math.isfinite, scales)):
            raise ConceptError(f"the deltas of {projection} have scales {scales}; allowed: finite numbers")
        sites = [layout.sites[i] for i in note["sites"]]
        read = _unpack_slots if projection == SLOTS else (
            _unpack_low_rank if f"{projection}.up" in tensors else _unpack_sparse)
        for site, delta in zip(sites, read(tensors, projection, note, sites, scales), strict=True):
            deltas[site.index, projection] = delta
    return deltas


def _unpack_low_rank(tensors: Mapping[str, Tensor], projection: str, _note: dict, sites: list[Site],
                     scales: list[float]) -> list[Delta]:
    up, down = tensors[f"{projection}.up"], tensors[f"{projection}.down"]
    shapes = [site.shape(projection) for site in sites]
    ups = _split(up, [a for a, _ in shapes], 0, 2, f"{projection}.up")
    downs = _split(down, [b for _, b in shapes], 1, 2, f"{projection}.down")
    if up.shape[1] != down.shape[0]:
        raise ConceptError(f"tensors '{projection}.up' and '{projection}.down' have ranks {up.shape[1]} and "
                           f"{down.shape[0]}; they must agree")
    return [LowRankDelta(*factors) for factors in zip(ups, downs, scales, strict=True)]


def _unpack_sparse(tensors: Mapping[str, Tensor], projection: str, note: dict, sites: list[Site],
                   scales: list[float]) -> list[Delta]:
    indices = _split(tensors[f"{projection}.indices"], note["counts"], 0, 1, f"{projection}.indices")
    values = _split(tensors[f"{projection}.values"], note["counts"], 0, 1, f"{projection}.values")
    deltas: list[Delta] = []
    for site, index, value, scale in zip(sites, indices, values, scales, strict=True):
        a, b = site.shape(projection)
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < a * b:
            raise ConceptError(f"tensor '{projection}.indices' points outside the {a}x{b} weight of site "
                               f"{site.index}")
        deltas.append(SparseDelta((a, b), index, value, scale))
    return deltas


def _packed_slots(slots: Sequence[SlotDelta]) -> dict[str, Tensor]:
    counts = {delta.shape[0] for delta in slots}
    if len(counts) > 1:
        raise ConceptError(f"the sites have {sorted(counts)} slots; allowed: one number for all sites")
    return {f"{SLOTS}.key": torch.cat([delta.key for delta in slots], dim=1),
            f"{SLOTS}.value": torch.cat([delta.value for delta in slots], dim=1)}


def _unpack_slots(tensors: Mapping[str, Tensor], _projection: str, _note: dict, sites: list[Site],
                  scales: list[float]) -> list[Delta]:
    widths = [site.width for site in sites]
    keys, values = (_split(tensors[name], widths, 1, 2, name) for name in (f"{SLOTS}.key", f"{SLOTS}.value"))
    if len(tensors[f"{SLOTS}.key"]) != len(tensors[f"{SLOTS}.value"]):
        raise ConceptError(f"tensors '{SLOTS}.key' and '{SLOTS}.value' have different numbers of slots; they "
                           "must agree")
    return [SlotDelta(key, value, site.heads, scale)
            for key, value, site, scale in zip(keys, values, sites, scales, strict=True)]


def _split(tensor: Tensor, sizes: list[int], dim: int, ndim: int, name: str) -> tuple[Tensor, ...]:
    if tensor.ndim != ndim or min(sizes, default=0) < 0 or tensor.shape[dim] != sum(sizes):
        raise ConceptError(f"tensor '{name}' has shape {tuple(tensor.shape)}; of its {ndim} dimensions, "
                           f"{dim} must be {sum(sizes)}")
    return tensor.split(sizes, dim=dim)

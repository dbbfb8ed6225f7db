"""Neurons are entries of key and value weights that a concept may change. This module selects them by score.

Source: Select Concept Neuronsion, CNS (Liao et al., ICCV 2025, arXiv 2510.02296). According to its project
page and abstract, base neurons respond strongly to the concept, general neurons to many unrelated prompts.
Concept neurons are base minus general, `M_con = M_base AND NOT M_gen`, in W_k and W_v of cross-attention,
about 0.13 % of the parameters. The paper's thresholds were not available, nor whether a neuron is an entry or
a row. Shares, quorum and unit are therefore our choice. See neurons.scores for the scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConceptError
from ..model.deltas import DeltaKey
from ..model.sites import PROJECTIONS, SiteLayout

Scores = Mapping[DeltaKey, Tensor]      # importance of every entry of a weight, `[a, b]` float32, 0 or more
UNITS = ("weight", "row")
Size = tuple[int, int]
_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class NeuronSelection:
    """Selected entries of weights. indices: per site and projection, sorted flat int32 indices into an `[a,
    b]` weight, row by row; sizes: (a, b) of each. With unit "row", a neuron is a row. Raises ConceptError for
    repeated indices or indices outside the weight.
    """

    indices: Mapping[DeltaKey, Tensor]
    sizes: Mapping[DeltaKey, tuple[int, int]]

    def __post_init__(self) -> None:
        ordered = {}
        for key, indices in self.indices.items():
            a, b = self.sizes[key]
            places = indices.detach().cpu().long().flatten().sort().values
            if len(places) and (places[0] < 0 or places[-1] >= a * b or (places[1:] == places[:-1]).any()):
                raise ConceptError(f"the neurons of {key[1]} of site {key[0]} are places {int(places[0])} to "
                                   f"{int(places[-1])}; allowed: each of 0 to {a * b - 1} once")
            ordered[key] = places.int()
        object.__setattr__(self, "indices", dict(sorted(ordered.items())))

    @classmethod
    def of_masks(cls, masks: Mapping[DeltaKey, Tensor]) -> NeuronSelection:
        """Builds a selection from bool masks `[a, b]`, True where selected."""
        return cls({key: mask.flatten().nonzero().squeeze(1) for key, mask in masks.items()},
                   {k: size_of(m) for k, m in masks.items()})

    @classmethod
    def of_rows(cls, rows: Mapping[DeltaKey, Tensor], layout: SiteLayout) -> NeuronSelection:
        """Builds a selection of whole rows from row numbers `[n]` per weight."""
        sizes = {(index, projection): layout.sites[index].shape(projection) for index, projection in rows}
        places = {key: _entries(numbers.long(), sizes[key][1], "row") for key, numbers in rows.items()}
        return cls(places, sizes)

    def __len__(self) -> int:
        return sum(places.numel() for places in self.indices.values())

    def share(self, parameters: int = 0) -> float:
        """Selected entries / `parameters`. 0 = divide by the entries of the weights in the selection."""
        return len(self) / max(1, parameters or sum(a * b for a, b in self.sizes.values()))

    def mask(self, key: DeltaKey) -> Tensor:
        """Mask `[a, b]` bool of one weight of the selection. Raises KeyError for any other."""
        a, b = self.sizes[key]
        flat = torch.zeros(a * b, dtype=torch.bool)
        flat[self.indices[key].long()] = True
        return flat.view(a, b)

    def __or__(self, other: NeuronSelection) -> NeuronSelection:
        """Union."""
        return self._combined(other, {*self.sizes, *other.sizes}, torch.logical_or)

    def __sub__(self, other: NeuronSelection) -> NeuronSelection:
        """Difference: `self AND NOT other`."""
        return self._combined(other, set(self.sizes), lambda first, second: first & ~second)

    def __and__(self, other: NeuronSelection) -> NeuronSelection:
        """Intersection."""
        return self._combined(other, {*self.sizes} & {*other.sizes}, torch.logical_and)

    def _combined(self, other: NeuronSelection, keys: set[DeltaKey], rule) -> NeuronSelection:
        masks = {}
        for key in keys:
            sizes = {tuple(s.sizes[key]) for s in (self, other) if key in s.sizes}
            if len(sizes) > 1:
                raise ConceptError(f"the neuron selections have {key[1]} of site {key[0]} as "
                                   f"{sorted(sizes)}; allowed: one size")
            nothing = torch.zeros(next(iter(sizes)), dtype=torch.bool)
            masks[key] = rule(*(s.mask(key) if key in s.sizes else nothing for s in (self, other)))
        return NeuronSelection.of_masks(masks)

    def check_fits(self, layout: SiteLayout) -> None:
        """Raises ConceptError unless the layout has every weight in the same size."""
        for (index, projection), size in self.sizes.items():
            if not 0 <= index < len(layout) or projection not in PROJECTIONS:
                raise ConceptError(f"the neuron selection has {projection} of site {index}; this base has "
                                   f"{layout.describe()}")
            if tuple(size) != layout.sites[index].shape(projection):
                raise ConceptError(f"the neuron selection has the size {size[0]}x{size[1]} for "
                                   f"{projection} of site {index}; this base needs "
                                   f"{'x'.join(map(str, layout.sites[index].shape(projection)))}")

    def to_tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """One bit per entry: prefix and `3-to_k` -> uint8 `[ceil(a b / 8)]`, lowest bit first."""
        packed = {}
        for index, projection in self.indices:
            flat = self.mask((index, projection)).flatten()
            bits = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
            packed[f"{prefix}{index}-{projection}"] = (bits * _BITS).sum(1).to(torch.uint8)
        return packed

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], layout: SiteLayout,
                     prefix: str = "") -> NeuronSelection:
        """Inverse of `to_tensors`; tensors without the prefix are skipped.

        Raises:
            ConceptError: A name or size does not fit the layout.
        """
        masks = {}
        for name, packed in tensors.items():
            if not name.startswith(prefix):
                continue
            index, _, projection = name.removeprefix(prefix).partition("-")
            if not index.isdecimal() or int(index) >= len(layout) or projection not in PROJECTIONS:
                raise ConceptError(f"the neuron mask '{name}' belongs to no weight; this base has "
                                   f"{layout.describe()}")
            a, b = layout.sites[int(index)].shape(projection)
            if packed.dtype != torch.uint8 or tuple(packed.shape) != (-(-a * b // 8),):
                raise ConceptError(f"the neuron mask '{name}' is {packed.dtype} {tuple(packed.shape)}; this "
                                   f"base needs {-(-a * b // 8)} bytes")
            bits = packed.cpu().unsqueeze(1).bitwise_and(_BITS).bool().flatten()
            masks[int(index), projection] = bits[:a * b].view(a, b)
        return cls.of_masks(masks)


def size_of(scores: Tensor) -> Size:
    a, b = scores.shape
    return a, b


def unit_count(size: Size, share: float, unit: str = "weight") -> int:
    """Number of units (entries or rows) in a share of an (a, b) weight, at least one."""
    if unit not in UNITS or not 0 < share <= 1:
        raise ConceptError(f"unit and share of neurons are {unit!r} and {share}; allowed: "
                           f"{' or '.join(UNITS)}, above 0 to 1")
    return max(1, int(share * (size[0] * size[1] if unit == "weight" else size[0])))


def _units(scores: Tensor, unit: str) -> Tensor:
    return scores.flatten() if unit == "weight" else scores.sum(1)


def _entries(units: Tensor, width: int, unit: str) -> Tensor:
    if unit == "weight":
        return units
    return (units.unsqueeze(1) * width + torch.arange(width, device=units.device)).flatten()


def _top(scores: Tensor, share: float, unit: str) -> Tensor:
    """Units with the highest scores. Ties go to the first one."""
    order = _units(scores, unit).sort(descending=True, stable=True).indices
    return order[:unit_count(size_of(scores), share, unit)]


def base_neurons(scores: Scores, share: float = 0.1, unit: str = "weight") -> NeuronSelection:
    """M_base: the top `share` of every weight by score. unit: "weight" (entries) or "row" (by the sum of
    their entries).
    """
    return NeuronSelection({k: _entries(_top(s, share, unit), s.shape[1], unit) for k, s in scores.items()},
                           {k: size_of(s) for k, s in scores.items()})


def concept_neurons(scores: Scores, general: NeuronSelection | None, share: float = 0.058,
                    unit: str = "weight") -> NeuronSelection:
    """M_con = M_base AND NOT M_gen, with M_base just large enough that `share` of every weight remains.

    Args:
        scores: Score of every entry of every weight.
        general: M_gen, None = no general neurons. A row with a general entry is excluded.
        share: Share of each weight. The default, 5.8 % of W_k and W_v, equals the paper's 0.13 % of SD1.5's
            UNet.
        unit: "weight" or "row".
    """
    selected = {}
    for key, score in scores.items():
        units = _units(score, unit).clone()
        if general is not None and key in general.sizes:
            blocked = general.mask(key).to(score.device)
            units[blocked.flatten() if unit == "weight" else blocked.any(1)] = -1.0
        order = units.sort(descending=True, stable=True).indices
        best = order[:unit_count(size_of(score), share, unit)]
        selected[key] = _entries(best[units[best] >= 0], score.shape[1], unit)
    return NeuronSelection(selected, {key: size_of(score) for key, score in scores.items()})


class Votes:
    """M_gen: entries (or rows) in the top `share` for at least `quorum` of many unrelated prompts."""

    def __init__(self, share: float = 0.1, quorum: float = 0.5, unit: str = "weight") -> None:
        if not 0 < quorum <= 1:
            raise ConceptError(f"the quorum of general neurons is {quorum}; allowed: above 0 to 1")
        self.share, self.quorum, self.unit, self.count = share, quorum, unit, 0
        self.votes: dict[DeltaKey, Tensor] = {}
        self.sizes: dict[DeltaKey, Size] = {}

    def add(self, scores: Scores) -> None:
        """Adds the votes of another prompt from its scores."""
        self.count += 1
        for key, score in scores.items():
            self.sizes[key] = size_of(score)
            if key not in self.votes:
                count = _units(score, self.unit).shape
                self.votes[key] = torch.zeros(count, dtype=torch.int16, device=score.device)
            self.votes[key][_top(score, self.share, self.unit)] += 1

    def general(self) -> NeuronSelection:
        needed = max(1e-9, self.quorum * self.count)
        units = {key: (votes >= needed).nonzero().squeeze(1) for key, votes in self.votes.items()}
        entries = {key: _entries(chosen, self.sizes[key][1], self.unit) for key, chosen in units.items()}
        return NeuronSelection(entries, self.sizes)

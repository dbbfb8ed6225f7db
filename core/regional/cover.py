"""Assigns the cells of a grid to regions, in a layout that needs the same few operations for any number of
regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# a cover with more places per cell is not used as a partition, because padding costs arithmetic
MOST = 1.1
LIKE = 0.5      # regions share a group if the smaller one has at least this share of the larger one's cells


@dataclass(frozen=True)
class Group:
    """G regions that are computed together.

    Attributes:
        members: Their numbers.
        cells: The cells of each, `[G, S']`; short rows are padded with cell 0.
        own: `[G, S']`, False at the padding; None without padding.
    """

    members: tuple[int, ...]
    cells: Tensor
    own: Tensor | None = None


@dataclass(frozen=True)
class Order:
    """The places of a cover in a batch of B pictures of S cells, stored one after another.

    Attributes:
        cells: Per group, the cells of its places, `[G * B * S']`, ordered by region, then by picture.
        back: Per source, the place that each cell reads, `[B * S]`.
        whole: `[P]`, the cells of all places, then the cells of the scene alone, ordered by picture.
        home: `[B * S]`, the position of each cell in `whole`. Only meaningful for a partition.
    """

    cells: tuple[Tensor, ...]
    back: tuple[Tensor, ...]
    whole: Tensor
    home: Tensor


@dataclass(frozen=True)
class Cover:
    """Which regions cover which cells, with which weights.

    The result of one region at one cell is called a place. The results of the groups are concatenated, member
    by member. A cell's value is the weighted sum of up to M places and the scene.

    Attributes:
        groups: The regions that have cells.
        sources: `[S, M]`, the places of every cell.
        weights: `[b, S, M]`, their weights; 0 for unused sources. b is the batch size if pictures have their
            own masks, else 1.
        scene: `[b, S]`, the weight of the scene.
        needs_scene: Whether the scene has a share of any cell.
        is_one_each: Whether every cell reads one place with weight 1.
        is_partition: Whether every cell of all pictures reads either one place or the scene, with weight 1,
            and padding is rare.
    """

    groups: tuple[Group, ...]
    sources: Tensor
    weights: Tensor
    scene: Tensor
    needs_scene: bool
    is_one_each: bool = False
    is_partition: bool = False
    _cast: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False, compare=False)
    _orders: dict[int, Order] = field(default_factory=dict, repr=False, compare=False)

    def weights_in(self, dtype: torch.dtype) -> Tensor:
        """The weights as `[b, S, M, 1]` in the computation's type. The cast is cached."""
        if dtype not in self._cast:
            self._cast[dtype] = self.weights.to(dtype).unsqueeze(-1)
        return self._cast[dtype]

    def order(self, batch: int) -> Order:
        """The places in a batch of the given number of pictures. Cached."""
        if batch not in self._orders:
            self._orders[batch] = self._ordered(batch)
        return self._orders[batch]

    def _ordered(self, batch: int) -> Order:
        length, pictures = len(self.sources), torch.arange(batch, device=self.sources.device).view(1, -1, 1)
        cells, places, start = [], [], 0
        for group in self.groups:
            cells.append((group.cells.unsqueeze(1) + length * pictures).flatten())      # shape [G, B, S']
            members, most = group.cells.shape
            indices = start + torch.arange(len(cells[-1]), device=pictures.device).view(members, batch, most)
            places.append(indices.transpose(0, 1).flatten(1))
            start += len(cells[-1])
        in_batch = torch.cat([*places, pictures.new_zeros(batch, 0)], 1)      # [B, places of a picture]
        back = tuple(in_batch[:, source].flatten() for source in self.sources.unbind(1))
        scenes = ((self.scene[0] == 1).nonzero().view(1, 1, -1) + length * pictures).flatten()
        whole = torch.cat([*cells, scenes])
        home = back[0].clone() if back else torch.zeros(batch * length, dtype=torch.long,
                                                        device=pictures.device)
        home[scenes] = torch.arange(start, len(whole), device=pictures.device)
        return Order(tuple(cells), back, whole, home)


def _grouped(counts: Sequence[int]) -> list[list[int]]:
    """Groups regions with cells by similar size, large ones first."""
    groups: list[list[int]] = []
    for u in sorted((u for u, count in enumerate(counts) if count), key=lambda u: -counts[u]):
        if groups and counts[u] >= LIKE * counts[groups[-1][0]]:
            groups[-1].append(u)
        else:
            groups.append([u])
    return groups


def _sources(regions: Sequence[tuple[Tensor, Tensor, Tensor]], length: int, batch: int,
             like: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `sources` and `weights` of a `Cover` from the cells, places and weights of each region."""
    depth = torch.zeros(length, dtype=torch.long, device=like.device)
    slots = []
    for cells, _, _ in regions:
        slots.append(depth[cells].clone())
        depth[cells] += 1
    width = int(depth.max()) if regions else 0
    sources = torch.zeros(length, width, dtype=torch.long, device=like.device)
    weights = torch.zeros(batch, length, width, device=like.device, dtype=like.dtype)
    for (cells, places, share), slot in zip(regions, slots, strict=True):
        sources[cells, slot] = places
        weights[:, cells, slot] = share
    return sources, weights


def cover_of(region_share: Tensor, scene_share: Tensor) -> Cover:
    """Builds the cover for given shares.

    Args:
        region_share: Shares of the regions, `[U, S]`, or `[U, b, S]` if pictures have their own masks; see
            `regions.shares`.
        scene_share: Share of the scene, `[S]` or `[b, S]`.
    """
    if region_share.ndim == 2:
        region_share, scene_share = region_share.unsqueeze(1), scene_share.unsqueeze(0)
    device, (batch, length) = region_share.device, scene_share.shape
    held = [share.any(0).nonzero().squeeze(1) for share in region_share]
    groups, start = [], 0
    regions: list[tuple[Tensor, Tensor, Tensor]] = []      # cells, places, weights
    for members in _grouped([len(cells) for cells in held]):
        most = len(held[members[0]])
        rows = torch.zeros(len(members), most, dtype=torch.long, device=device)
        for g, u in enumerate(members):
            cells = held[u]
            rows[g, :len(cells)] = cells
            places = start + g * most + torch.arange(len(cells), device=device)
            regions.append((cells, places, region_share[u][:, cells]))
        lengths = torch.tensor([len(held[u]) for u in members], device=device)
        is_cell = torch.arange(most, device=device) < lengths.unsqueeze(1)
        groups.append(Group(tuple(members), rows, None if bool(is_cell.all()) else is_cell))
        start += rows.numel()
    sources, weights = _sources(regions, length, batch, region_share)
    width = sources.shape[1]
    is_one_each = width == 1 and bool((weights == 1).all())
    scenes = int((scene_share == 1).sum())
    is_either = bool(((weights == 1).any(-1) ^ (scene_share == 1)).all())      # shares sum to 1
    is_sharp = width == 1 and batch == 1 and is_either
    is_partition = is_sharp and start + scenes <= MOST * length
    return Cover(tuple(groups), sources, weights, scene_share, bool(scene_share.any()), is_one_each,
                 is_partition)

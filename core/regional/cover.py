"""Which region reads which cells of a grid, laid out so that any number of regions costs the same few operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MOST = 1.1      # of the picture's cells: so many places may a picture have that is gone through part by part
LIKE = 0.5      # regions share an operation when the smaller has at least this share of the larger one's cells


@dataclass(frozen=True)
class Group:
    """Regions that are computed together: their numbers, and the cells of each `[G, S']`, short ones filled up with cell 0; `own` `[G, S']`
    is True at the cells that are no filling, None where there is none."""

    members: tuple[int, ...]
    cells: Tensor
    own: Tensor | None = None


@dataclass(frozen=True)
class Order:
    """A cover's places in a batch of B pictures that lie one after another, `[B * S]` cells. cells: per group those of its places, region
    by region and there picture by picture `[G * B * S']`; back: per source the places that the cells take it from `[B * S]`.

    whole `[P]`: the cells of all places, and behind them those that are the scene's alone, picture by picture; home `[B * S]`: where in it
    a cell is (of a partition)."""

    cells: tuple[Tensor, ...]
    back: tuple[Tensor, ...]
    whole: Tensor
    home: Tensor


@dataclass(frozen=True)
class Cover:
    """groups: of the regions with cells at all. Their results lie one after another, member by member; cell s takes its own from the
    places `sources[s]` `[S, M]` with the weights `[b, S, M]` (0 where it takes less than M), and `scene` `[b, S]` of the scene's.
    b is 1, or the batch where every picture has masks of its own."""

    groups: tuple[Group, ...]
    sources: Tensor
    weights: Tensor
    scene: Tensor
    needs_scene: bool
    is_one_each: bool = False      # every cell takes one source, whole: nothing to weigh
    is_partition: bool = False     # every cell takes one source or the scene, whole, in all pictures; and there is hardly a filling
    _cast: dict = field(default_factory=dict, repr=False, compare=False)
    _orders: dict = field(default_factory=dict, repr=False, compare=False)

    def weights_in(self, dtype: torch.dtype) -> Tensor:
        """The weights `[b, S, M, 1]` in the type of the arithmetic, cast once."""
        if dtype not in self._cast:
            self._cast[dtype] = self.weights.to(dtype).unsqueeze(-1)
        return self._cast[dtype]

    def order(self, batch: int) -> Order:
        if batch not in self._orders:
            self._orders[batch] = self._ordered(batch)
        return self._orders[batch]

    def _ordered(self, batch: int) -> Order:
        length, pictures = len(self.sources), torch.arange(batch, device=self.sources.device).view(1, -1, 1)
        cells, places, start = [], [], 0
        for group in self.groups:
            cells.append((group.cells.unsqueeze(1) + length * pictures).flatten())      # of [G, B, S']
            members, most = group.cells.shape
            own = start + torch.arange(len(cells[-1]), device=pictures.device).view(members, batch, most)
            places.append(own.transpose(0, 1).flatten(1))
            start += len(cells[-1])
        where = torch.cat([*places, pictures.new_zeros(batch, 0)], 1)      # [B, places]: of a picture's places those in the batch
        back = tuple(where[:, source].flatten() for source in self.sources.unbind(1))
        scenes = ((self.scene[0] == 1).nonzero().view(1, 1, -1) + length * pictures).flatten()
        whole = torch.cat([*cells, scenes])
        home = back[0].clone() if back else torch.zeros(batch * length, dtype=torch.long, device=pictures.device)
        home[scenes] = torch.arange(start, len(whole), device=pictures.device)
        return Order(tuple(cells), back, whole, home)


def _grouped(counts: Sequence[int]) -> list[list[int]]:
    """Numbers of the regions with cells, large ones first, in groups of about one size."""
    groups: list[list[int]] = []
    for u in sorted((u for u, count in enumerate(counts) if count), key=lambda u: -counts[u]):
        if groups and counts[u] >= LIKE * counts[groups[-1][0]]:
            groups[-1].append(u)
        else:
            groups.append([u])
    return groups


def cover_of(region_share: Tensor, scene_share: Tensor) -> Cover:
    """From the shares of the regions `[U, S]` or `[U, b, S]` and of the scene `[S]` or `[b, S]`, see regions.shares."""
    if region_share.ndim == 2:
        region_share, scene_share = region_share.unsqueeze(1), scene_share.unsqueeze(0)
    device, (batch, length) = region_share.device, scene_share.shape
    held = [share.any(0).nonzero().squeeze(1) for share in region_share]
    groups, start = [], 0
    found: list[tuple[Tensor, Tensor, Tensor]] = []      # per region: cells, places, weights
    for members in _grouped([len(cells) for cells in held]):
        most = len(held[members[0]])
        rows = torch.zeros(len(members), most, dtype=torch.long, device=device)
        for g, u in enumerate(members):
            cells = held[u]
            rows[g, :len(cells)] = cells
            found.append((cells, start + g * most + torch.arange(len(cells), device=device), region_share[u][:, cells]))
        own = torch.arange(most, device=device) < torch.tensor([len(held[u]) for u in members], device=device).unsqueeze(1)
        groups.append(Group(tuple(members), rows, None if bool(own.all()) else own))
        start += rows.numel()
    depth = torch.zeros(length, dtype=torch.long, device=device)
    slots = []
    for cells, _, _ in found:
        slots.append(depth[cells].clone())
        depth[cells] += 1
    width = int(depth.max()) if found else 0
    sources = torch.zeros(length, width, dtype=torch.long, device=device)
    weights = torch.zeros(batch, length, width, device=device, dtype=region_share.dtype)
    for (cells, places, share), slot in zip(found, slots, strict=True):
        sources[cells, slot] = places
        weights[:, cells, slot] = share
    is_one_each = width == 1 and bool((weights == 1).all())
    scenes = int((scene_share == 1).sum())
    is_sharp = width == 1 and batch == 1 and bool(((weights[..., 0] == 1) ^ (scene_share == 1)).all())      # shares sum to 1
    is_partition = is_sharp and start + scenes <= MOST * length
    return Cover(tuple(groups), sources, weights, scene_share, bool(scene_share.any()), is_one_each, is_partition)

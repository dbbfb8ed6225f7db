"""What sites do while a picture with regions is sampled: one UNet evaluation per step, whatever the number of regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..deltas import Deltas
from ..hosts.backbone import Backbone, Context, SiteProgram
from ..sites import Site, grid_of
from .attention import region_attention
from .regions import Region, region_mask, shares


class DeltaProgram(SiteProgram):
    """Deltas as activations instead of folded weights: for prompts that share a batch with others."""

    def __init__(self, deltas: Deltas) -> None:
        self.deltas = deltas

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        delta = self.deltas.get((site.index, projection))
        return y if delta is None else y + delta.apply(x).to(y.dtype)


@dataclass(frozen=True)
class Part:
    """A region, or the scene: its context of two rows (negative, positive) and its own deltas."""

    context: Context
    deltas: Deltas


class RegionProgram(SiteProgram):
    """Region attention with per-region deltas.

    Keys and values of every region depend on text only: they are computed here, once per sampling, each with its region's deltas. Region
    deltas on to_q and to_out are masked low-rank additions. `rows` says for each row of the UNet's batch whether it is the negative
    (0) or the positive (1) half of guidance; `latent` is the latent's height and width.
    """

    def __init__(self, backbone: Backbone, scene: Part, regions: Sequence[Region], parts: Sequence[Part], rows: Tensor,
                 latent: tuple[int, int]) -> None:
        self.scene, self.regions, self.parts, self.rows, self.latent = scene, list(regions), list(parts), rows, latent
        self.progress = 0.0
        self._memory = {site.index: [self._keys_values(backbone, site, part) for part in parts] for site in backbone.layout.sites}
        self._shares: dict[tuple, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def _keys_values(backbone: Backbone, site: Site, part: Part) -> tuple[Tensor, Tensor]:
        context, program = part.context.at(site), DeltaProgram(part.deltas)
        key, value = (program.project(site, name, context, backbone.project(site, name, context)) for name in ("to_k", "to_v"))
        return key, value

    def _split(self, cells: int, device) -> tuple[Tensor, Tensor]:
        """Shares of the regions `[U, S]` and of the scene `[S]` at a site's grid, for the regions that are on now."""
        active = tuple(region.active(self.progress) for region in self.regions)
        key = (cells, active)
        if key not in self._shares:
            grid = grid_of(cells, *self.latent)
            masks = torch.stack([region.strength * on * region_mask(region, *grid)
                                 for region, on in zip(self.regions, active, strict=True)])
            region_share, scene_share = shares(masks.flatten(1).to(device))
            self._shares[key] = region_share, scene_share
        return self._shares[key]

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        key = (site.index, projection)
        scene = self.scene.deltas.get(key)
        if projection in ("to_k", "to_v"):      # the scene's own; the regions' are in memory
            return y if scene is None else y + scene.apply(x).to(y.dtype)
        region_share, scene_share = self._split(x.shape[1], x.device)
        if scene is not None:
            y = y + scene.apply(x).to(y.dtype) * scene_share.to(y.dtype).view(1, -1, 1)
        for share, part in zip(region_share, self.parts, strict=True):
            delta = part.deltas.get(key)
            cells = share.nonzero().squeeze(1)
            if delta is not None and cells.numel():
                y = y.index_add(1, cells, delta.apply(x[:, cells]).to(y.dtype) * share[cells].to(y.dtype).view(1, -1, 1))
        return y

    def attend(self, site: Site, query: Tensor, key: Tensor, value: Tensor, default) -> Tensor:
        base = default(query, key, value)
        region_share, _ = self._split(query.shape[1], query.device)
        memory = self._memory[site.index]
        keys = [k[self.rows].to(query.dtype) for k, _ in memory]
        values = [v[self.rows].to(query.dtype) for _, v in memory]
        return region_attention(query, base, keys, values, region_share, default)

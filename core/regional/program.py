"""What sites do while a picture with regions is sampled: one UNet evaluation per step, whatever the number of regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..bound import BoundConcepts, BoundProgram, added_by_others, bound_attention
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
    """A region, or the scene: its context of two rows (negative, positive), its own deltas, and those bound to words of its context."""

    context: Context
    deltas: Deltas
    bound: Mapping[str, Deltas] = field(default_factory=dict)


class BothProgram(BoundProgram):
    """Deltas as activations, and bound concepts: a part alone over the whole picture, or one model of an average."""

    def __init__(self, deltas: Deltas, bound: Mapping[str, Deltas]) -> None:
        super().__init__(bound)
        self.plain = DeltaProgram(deltas)

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        return super().project(site, projection, x, self.plain.project(site, projection, x, y))


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
        self.scene_concepts: BoundConcepts | None = None      # where the host knows better than the scene's context which words a call has
        self._bound = [BoundConcepts(part.bound, part.context) for part in (scene, *parts)]
        own = list(zip(parts, self._bound[1:], strict=True))
        self._memory = {site.index: [self._keys_values(backbone, site, *one) for one in own] for site in backbone.layout.sites}
        self._asked: Tensor | None = None      # what to_q of the running site read
        self._more: Tensor | None = None       # what bound concepts add behind its to_out
        self._shares: dict[tuple, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def _keys_values(backbone: Backbone, site: Site, part: Part, bound: BoundConcepts) -> tuple[Tensor, Tensor]:
        context, program, found = part.context.at(site), DeltaProgram(part.deltas), []
        for name in ("to_k", "to_v"):
            plain = program.project(site, name, context, backbone.project(site, name, context))
            found.append(bound.project(site, name, context, plain))
        return found[0], found[1]

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
            y = y if scene is None else y + scene.apply(x).to(y.dtype)
            return self._scene_bound().project(site, projection, x, y)
        if projection == "to_q":
            self._asked = x
        elif self._more is not None:
            y, self._more = y + self._more.to(y.dtype), None
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
        region_share, scene_share = self._split(query.shape[1], query.device)
        scene, self._more = self._scene_bound(), None
        everywhere = torch.arange(query.shape[1], device=query.device)
        if scene:
            base = self._special(site, scene)(query, key, value, everywhere, scene_share) + added_by_others(default, query, key, value)
        else:
            base = default(query, key, value)
        special = {u: self._special(site, bound[self.rows]) for u, bound in enumerate(self._bound[1:]) if bound}
        memory = self._memory[site.index]
        keys = [k[self.rows].to(query.dtype) for k, _ in memory]
        values = [v[self.rows].to(query.dtype) for _, v in memory]
        return region_attention(query, base, keys, values, region_share, default, special)

    def _scene_bound(self) -> BoundConcepts:
        return self._bound[0][self.rows] if self.scene_concepts is None else self.scene_concepts

    def _special(self, site: Site, bound: BoundConcepts):
        """Attention of a part with bound concepts; what they add behind to_out is kept by the way."""
        def attend(query: Tensor, key: Tensor, value: Tensor, cells: Tensor, share: Tensor) -> Tensor:
            found, more = bound_attention(site.heads, self._asked[:, cells], query, key, value, bound.bindings(site))
            more = more * share.to(more.dtype).view(1, -1, 1)
            if self._more is None:
                self._more = torch.zeros_like(self._asked[..., :1]).expand(-1, -1, more.shape[-1]).clone()
            self._more.index_add_(1, cells, more)
            return found

        return attend

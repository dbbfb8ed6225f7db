"""A picture of what each region's words look at: attention maps, taken in the last step only, so that sampling keeps its price."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.maps import FINEST
from ..model.backbone import HostAttention, SiteCall
from ..model.sites import Site, grid_of
from .processor import RegionProcessor

AT_ONCE = 2**25      # weights of attention: so many pictures of a batch are looked at together


class ObservedRegions(RegionProcessor):
    """A RegionProgram that remembers, for every region, how much each place looks at its words.

    tokens: per region the positions of the words to look at; when `is_observing`, the maps of one forward pass are kept in `maps`:
    site index -> `[U, h, w]`, the share of attention on those positions, mean over heads and positive rows. Coarse grids tell who is
    where (Prompt-to-Prompt looks at 16 x 16 of 64 x 64); finer ones cost more and tell no more.
    """

    def __init__(self, *args, tokens: list[tuple[int, ...]], **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.tokens, self.is_observing, self.maps = tokens, False, {}
        self._chosen: Tensor | None = None      # [U, N]: 1 at those positions

    def _looks(self, cells: int) -> bool:
        return self.is_observing and bool(self.parts) and cells <= max(FINEST, self.latent[0] * self.latent[1] // 16)

    def enter(self, call: SiteCall) -> None:
        if not self._looks(call.hidden.shape[1]):      # maps want the cells in their places
            super().enter(call)

    def attend(self, call: SiteCall, query: Tensor, key: Tensor, value: Tensor, attention: HostAttention) -> Tensor:
        site, cells = call.site, query.shape[1]
        if self._looks(cells):
            shares = [self._shares(site, *pair) for pair in zip(*(self._pieces(site, x) for x in (query, call.hidden)), strict=True)]
            self.maps[site.index] = torch.cat(shares, 1).mean(1).unflatten(-1, grid_of(cells, *self.latent))
        return super().attend(call, query, key, value, attention)

    def _pieces(self, site: Site, x: Tensor) -> tuple[Tensor, ...]:
        """The positive rows in pieces `[b, S, c]` of which one can be looked at by all regions at once."""
        one = len(self.parts) * site.heads * x.shape[1] * self.readings[site.index][0].key.shape[1]
        return x[self.rows.bool()].split(max(1, AT_ONCE // one))

    def _shares(self, site: Site, query: Tensor, asked: Tensor) -> Tensor:
        """`[U, b, S]`: every region looks at every cell, its own and others'."""
        stack = self._stack(site, tuple(range(len(self.parts))))
        q, longer = stack.asking(*(x.flatten(0, 1).expand(len(self.parts), -1, -1) for x in (query, asked)))
        q, k = (x.float().unflatten(-1, (site.heads, -1)) for x in (q, stack.key[:, 1]))      # [U, b * S or N, H, d]
        logits = torch.einsum("ushd,unhd->uhsn", q, k)
        if longer is not None:
            logits = logits + torch.einsum("usx,unhx->uhsn", longer.float(), stack.key_more[:, 1].float())
        weights = (logits * q.shape[-1] ** -0.5).softmax(-1).mean(1)
        return torch.einsum("usn,un->us", weights, self._positions(weights)).unflatten(1, (len(query), -1))

    def _positions(self, weights: Tensor) -> Tensor:
        if self._chosen is None:
            self._chosen = torch.zeros(len(self.tokens), weights.shape[-1])
            for row, places in zip(self._chosen, self.tokens, strict=True):
                row[list(places)] = 1.0
            self._chosen = self._chosen.to(weights)
        return self._chosen

    def picture_maps(self, size: tuple[int, int]) -> Tensor:
        """`[U, H, W]` in 0..1: the maps of all sites brought to `size`, averaged, each region stretched to its own range."""
        resized = [F.interpolate(m.unsqueeze(0), size, mode="bilinear")[0] for m in self.maps.values()]
        if not resized:
            return torch.zeros(len(self.parts), *size)
        maps = torch.stack(resized).mean(0).cpu()
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        return (maps - low) / (high - low).clamp(min=1e-8)

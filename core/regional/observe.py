"""A picture of what each region's words look at: attention maps, taken in the last step only, so that sampling keeps its price."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sites import Site, grid_of
from .program import RegionProgram


class ObservedRegions(RegionProgram):
    """A RegionProgram that remembers, for every region, how much each place looks at its words.

    tokens: per region the positions of the words to look at; when `is_observing`, the maps of one forward pass are kept in `maps`:
    site index -> `[U, h, w]`, the share of attention on those positions, mean over heads and positive rows.
    """

    def __init__(self, *args, tokens: list[tuple[int, ...]], **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.tokens, self.is_observing, self.maps = tokens, False, {}

    def attend(self, site: Site, query: Tensor, key: Tensor, value: Tensor, default) -> Tensor:
        if self.is_observing and query.shape[1] <= self.latent[0] * self.latent[1] // 4:      # the finest grids cost most and tell no more
            self.maps[site.index] = torch.stack([self._map(site, query, u) for u in range(len(self.parts))])
        return super().attend(site, query, key, value, default)

    def _map(self, site: Site, query: Tensor, u: int) -> Tensor:
        positive = self.rows.bool()
        stack, asked = self._stack(site, (u,)), query if self._asked is None else self._asked
        q, longer = (None if x is None else x[:, 0] for x in stack.asking(query[positive].unsqueeze(1), asked[positive].unsqueeze(1)))
        q, k = (x.unflatten(-1, (site.heads, -1)) for x in (q, stack.key[0, 1:].to(q.dtype)))      # [B or 1, S or N, H, d]
        logits = torch.einsum("bshd,xnhd->bhsn", q.float(), k.float())
        if longer is not None:
            logits = logits + torch.einsum("bsr,xnhr->bhsn", longer.float(), stack.key_more[0, 1:].float())
        weights = (logits * q.shape[-1] ** -0.5).softmax(-1)
        share = weights[..., list(self.tokens[u])].sum(-1).mean((0, 1))
        return share.view(grid_of(len(share), *self.latent)).cpu()

    def picture_maps(self, size: tuple[int, int]) -> Tensor:
        """`[U, H, W]` in 0..1: the maps of all sites brought to `size`, averaged, each region stretched to its own range."""
        resized = [F.interpolate(m.unsqueeze(0), size, mode="bilinear")[0] for m in self.maps.values()]
        if not resized:
            return torch.zeros(len(self.parts), *size)
        maps = torch.stack(resized).mean(0)
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        return (maps - low) / (high - low).clamp(min=1e-8)

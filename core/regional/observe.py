"""Attention maps of each region's words. They are recorded only in the last step, so that they cost almost
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.maps import coarse, finest
from ..model.processor import HostAttention, SiteCall
from ..model.sites import Site, grid_of
from .processor import RegionProcessor
from .regions import Region, masks_of, shares

# maximum number of attention weights in memory; limits the pictures per chunk
AT_ONCE = 2**25


class ObservedRegions(RegionProcessor):
    """A `RegionProcessor` that records, for every region, how much each cell attends to the region's words.

    Only coarse grids are recorded, see `attention.maps.coarse`. They are enough to locate concepts
    (Prompt-to-Prompt uses 16 x 16 of 64 x 64).

    Attributes:
        tokens: Per region, the positions of the words to observe.
        is_observing: Whether the next forward pass is recorded.
        maps: Site index -> `[U, h, w]`, the share of attention on those positions, averaged over heads and
            positive rows.
    """

    def __init__(self, *args, tokens: Sequence[tuple[int, ...]], **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.tokens, self.is_observing = list(tokens), False
        self.maps: dict[int, Tensor] = {}
        self._word_positions: Tensor | None = None

    def _observes(self, site: Site, cells: int) -> bool:
        is_coarse = site.of_transformer or cells <= finest(self.latent)
        return self.is_observing and bool(self.parts) and is_coarse

    def enter(self, call: SiteCall) -> None:
        if not self._observes(call.site, call.hidden.shape[1]):      # maps need the cells in their order
            super().enter(call)

    def attend(self, call: SiteCall, query: Tensor, key: Tensor, value: Tensor,
               attention: HostAttention) -> Tensor:
        site = call.site
        if self._observes(site, query.shape[1]):
            asking, hidden = (coarse(site, x, self.latent, finest(self.latent))
                              for x in (call.before_norm(query), call.hidden))
            assert asking is not None and hidden is not None
            chunks = zip(self._chunks(site, asking), self._chunks(site, hidden), strict=True)
            shares = torch.cat([self._shares(site, *chunk) for chunk in chunks], 1).mean(1)
            self.maps[site.index] = shares.unflatten(-1, grid_of(shares.shape[1], *self.latent))
        return super().attend(call, query, key, value, attention)

    def _chunks(self, site: Site, x: Tensor) -> tuple[Tensor, ...]:
        """The positive rows of x `[B, S, c]` in chunks that all regions can attend to at once."""
        weights = len(self.parts) * site.heads * x.shape[1] * self.keys_values[site.index][0].key.shape[1]
        return x[self.rows.bool()].split(max(1, AT_ONCE // weights))

    def _shares(self, site: Site, query: Tensor, hidden: Tensor) -> Tensor:
        """Attention on every region's words at every cell, inside and outside the region: `[U, b, S]`, from
        query and hidden `[b, S, c]`.
        """
        packed = self.packed(site, tuple(range(len(self.parts))))
        queries, extension = packed.queries(*(x.flatten(0, 1).expand(len(self.parts), -1, -1)
                                              for x in (query, hidden)))
        # [U, b * S or N, H, d]
        q, k = (x.float().unflatten(-1, (site.heads, -1)) for x in (queries, packed.key[:, 1]))
        logits = torch.einsum("ushd,unhd->uhsn", q, k)
        if extension is not None and packed.extension_key is not None:
            logits = logits + torch.einsum("usx,unhx->uhsn", extension.float(),
                                           packed.extension_key[:, 1].float())
        weights = (logits * q.shape[-1] ** -0.5).softmax(-1).mean(1)
        return torch.einsum("usn,un->us", weights, self._positions(weights)).unflatten(1, (len(query), -1))

    def _positions(self, weights: Tensor) -> Tensor:
        """`[U, N]`: 1 at the observed positions of each region."""
        if self._word_positions is None:
            positions = torch.zeros(len(self.tokens), weights.shape[-1])
            for row, places in zip(positions, self.tokens, strict=True):
                row[list(places)] = 1.0
            self._word_positions = positions.to(weights)
        return self._word_positions


def picture_maps(maps: Mapping[int, Tensor], regions: Sequence[Region], overlap: str,
                 size: tuple[int, int]) -> Tensor:
    """A picture of where the words of each region act, `[U, H, W]` in 0..1.

    The resized maps of all sites are averaged, scaled to the full range inside each region, and multiplied by
    the region's share of every cell, because elsewhere its words do not act.

    Args:
        maps: Site index -> `[U, h, w]`.
        regions: The U regions.
        overlap: As in `regions.shares`.
        size: Height and width of the picture.
    """
    if not maps:
        return torch.zeros(len(regions), *size)
    resized = [F.interpolate(m.unsqueeze(0), size, mode="bilinear")[0] for m in maps.values()]
    mean, (share, _) = torch.stack(resized).mean(0).cpu(), shares(masks_of(regions, *size), overlap)
    low = mean.masked_fill(share == 0, torch.inf).amin((1, 2), keepdim=True)
    high = mean.masked_fill(share == 0, -torch.inf).amax((1, 2), keepdim=True)
    return torch.where(share == 0, 0.0, share * (mean - low) / (high - low).clamp(min=1e-8))

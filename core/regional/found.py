"""Regions without boxes: attention maps show during sampling where each concept of a prompt is. Our own
method.

In the first steps the scene is sampled as usual, and the coarse sites record how much every cell attends to
each concept's words. After that, each concept gets a region: the cells where its words got most attention.
Each picture of a batch has its own regions. A region's prompt is the scene's prompt with class nouns in place
of the other concepts. This needs no phase before sampling and no extra evaluation. FreeFuse, the closest
related method, first samples part of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.maps import attention_maps, coarse, finest
from ..model.backbone import Projections
from ..model.processor import HostAttention, SiteCall
from ..model.sites import grid_of
from .processor import Part, RegionProcessor
from .regions import Region

FOUND_AFTER = 0.35      # share of the steps after which regions act
# a cell belongs to a concept if its map is above this share of its maximum and highest of all concepts
THRESHOLD = 0.5


class FoundRegions(RegionProcessor):
    """A `RegionProcessor` whose masks are found while sampling.

    Args:
        backbone, scene, rows, latent: As for `RegionProcessor`.
        names: Names of the concepts.
        parts: Per concept, its own prompt (see `Prompt.apart`) with its deltas.
        words: Per concept, the positions of its words in the scene's prompt.

    Attributes:
        found: The masks `[U, b, h, w]` for b pictures; None until they are found.
    """

    def __init__(self, backbone: Projections, scene: Part, names: Sequence[str], parts: Sequence[Part],
                 words: Sequence[tuple[int, ...]], rows: Tensor, latent: tuple[int, int]) -> None:
        everywhere = [Region(name, box=(0.0, 0.0, 1.0, 1.0)) for name in names]
        super().__init__(backbone, scene, everywhere, parts, rows, latent)
        self.words = list(words)
        self.found: Tensor | None = None
        self._sums: dict[int, Tensor] = {}      # cells of a grid -> sum of maps `[b, U, cells]`

    def phase(self) -> tuple:
        if self.found is None and self.progress >= FOUND_AFTER and self._sums:
            self.found, self._sums = self._masks(), {}
        return (self.found is not None,)

    def masks(self, grid: tuple[int, int]) -> Tensor:
        if self.found is None:
            return torch.zeros(len(self.parts), *grid)
        resized = F.interpolate(self.found, grid, mode="area" if grid[0] < self.found.shape[-2]
                                else "bilinear")
        # repeat each picture's masks for all its rows
        return resized[:, torch.arange(len(self.rows)) % resized.shape[1]]

    def attend(self, call: SiteCall, query: Tensor, key: Tensor, value: Tensor,
               attention: HostAttention) -> Tensor:
        positive = self.rows.bool()
        # before recording this step, so that the result is the same if the halves of guidance come in two
        # calls
        self.phase()
        if self.found is None and bool(positive.any()):
            asking = coarse(call.site, query[positive], self.latent, finest(self.latent))
            if asking is not None:
                maps = attention_maps(asking.float(), key[positive].float(), call.site.heads)
                recorded = torch.stack([maps[..., list(words)].mean(-1) for words in self.words], dim=1)
                self._sums[maps.shape[1]] = self._sums.get(maps.shape[1], 0) + recorded
        return super().attend(call, query, key, value, attention)

    def _masks(self) -> Tensor:
        """`[U, b, h, w]` of 0 and 1, on the finest recorded grid."""
        cells = max(self._sums)
        maps = self._sums[cells].unflatten(-1, grid_of(cells, *self.latent))
        maps = F.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)
        maps = maps / maps.amax((-2, -1), keepdim=True).clamp(min=1e-8)
        own = (maps > THRESHOLD) & (maps == maps.amax(1, keepdim=True))
        return own.float().transpose(0, 1).cpu()

"""Regions without boxes: where each concept of a prompt is, is read from attention while the picture is
sampled. Ours.

In the first steps the scene is sampled as it is, and the coarse sites record how much every place attends to
each concept's words. From then on every concept has a region where its words got most attention, in every
picture of a batch its own, with a prompt in which the other concepts are replaced by their class nouns. There
is no phase before sampling and no further evaluation. FreeFuse, the nearest relative, first samples a part of
the picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.maps import FINEST, attention_maps
from ..model.backbone import Projections
from ..model.processor import HostAttention, SiteCall
from ..model.sites import grid_of
from .processor import Part, RegionProcessor
from .regions import Region

FOUND_AFTER = 0.35      # share of the steps after which there are regions
# a place is a concept's where its map is above this share of its maximum, and highest of all concepts
THRESHOLD = 0.5


class FoundRegions(RegionProcessor):
    """A `RegionProcessor` whose masks are found while sampling.

    Args:
        backbone, scene, rows, latent: As for `RegionProcessor`.
        names: Of the concepts.
        parts: Per concept its own prompt, see `Prompt.apart`, with its deltas.
        words: Per concept the positions of its words in the scene's prompt.

    Attributes:
        found: The masks `[U, b, h, w]`, b pictures; None before they are found.
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
        # for every row the masks of its picture
        return resized[:, torch.arange(len(self.rows)) % resized.shape[1]]

    def attend(self, call: SiteCall, query: Tensor, key: Tensor, value: Tensor,
               attention: HostAttention) -> Tensor:
        cells, positive = query.shape[1], self.rows.bool()
        # before this step is recorded: whether both halves of guidance come in one call must not matter
        self.phase()
        finest = max(FINEST, self.latent[0] * self.latent[1] // 16)
        if self.found is None and bool(positive.any()) and cells <= finest:
            maps = attention_maps(query[positive].float(), key[positive].float(), call.site.heads)
            recorded = torch.stack([maps[..., list(words)].mean(-1) for words in self.words], dim=1)
            self._sums[cells] = self._sums.get(cells, 0) + recorded
        return super().attend(call, query, key, value, attention)

    def _masks(self) -> Tensor:
        """`[U, b, h, w]` of 0 and 1, on the finest recorded grid."""
        cells = max(self._sums)
        maps = self._sums[cells].unflatten(-1, grid_of(cells, *self.latent))
        maps = F.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)
        maps = maps / maps.amax((-2, -1), keepdim=True).clamp(min=1e-8)
        own = (maps > THRESHOLD) & (maps == maps.amax(1, keepdim=True))
        return own.float().transpose(0, 1).cpu()

"""Regions without boxes: where each concept of a prompt is, is read from attention while the picture is made. Ours.

In the first steps the scene is drawn as it is, and at the coarse sites is kept how much every place looks at each concept's words. From
then on every concept has a region there, in every picture of a batch its own, with a prompt in which the other concepts are their class
nouns. There is no phase before sampling and no further evaluation. FreeFuse, the nearest relative, samples a part of the picture first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.maps import FINEST, attention_maps
from ..model.backbone import Backbone, HostAttention, SiteCall
from ..model.sites import grid_of
from .processor import Part, RegionProcessor
from .regions import Region

LOOK = 0.35      # share of the steps after which regions are there
SHOWN = 0.5      # of its maximum: where a concept's map is above that and above the others', the place is its own


class FoundRegions(RegionProcessor):
    """A RegionProgram whose masks are found on the way. words: per concept the positions of its words in the scene's prompt; parts: per
    concept its prompt of `Prompt.apart`, with its deltas."""

    def __init__(self, backbone: Backbone, scene: Part, names: Sequence[str], parts: Sequence[Part], words: Sequence[tuple[int, ...]],
                 rows: Tensor, latent: tuple[int, int]) -> None:
        super().__init__(backbone, scene, [Region(name, box=(0.0, 0.0, 1.0, 1.0)) for name in names], parts, rows, latent)
        self.words, self.found = list(words), None      # found: `[U, b, h, w]` once the masks are known
        self._sums: dict[int, Tensor] = {}              # cells of a grid -> sum of maps `[b, U, cells]`

    def phase(self) -> tuple:
        if self.found is None and self.progress >= LOOK and self._sums:
            self.found, self._sums = self._masks(), {}
        return (self.found is not None,)

    def masks(self, grid: tuple[int, int]) -> Tensor:
        if self.found is None:
            return torch.zeros(len(self.parts), *grid)
        resized = F.interpolate(self.found, grid, mode="area" if grid[0] < self.found.shape[-2] else "bilinear")
        return resized[:, torch.arange(len(self.rows)) % resized.shape[1]]      # every row its picture's

    def attend(self, call: SiteCall, query: Tensor, key: Tensor, value: Tensor, attention: HostAttention) -> Tensor:
        cells, positive = query.shape[1], self.rows.bool()
        self.phase()      # before this step is looked at: whether both halves of guidance come in one call must not matter
        if self.found is None and bool(positive.any()) and cells <= max(FINEST, self.latent[0] * self.latent[1] // 16):
            maps = attention_maps(query[positive].float(), key[positive].float(), call.site.heads)
            seen = torch.stack([maps[..., list(words)].mean(-1) for words in self.words], dim=1)
            self._sums[cells] = self._sums.get(cells, 0) + seen
        return super().attend(call, query, key, value, attention)

    def _masks(self) -> Tensor:
        cells = max(self._sums)      # the finest of the grids
        maps = self._sums[cells].unflatten(-1, grid_of(cells, *self.latent))
        maps = F.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)
        maps = maps / maps.amax((-2, -1), keepdim=True).clamp(min=1e-8)
        own = (maps > SHOWN) & (maps == maps.amax(1, keepdim=True))
        return own.float().transpose(0, 1).cpu()

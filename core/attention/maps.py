"""Cross-attention maps of a concept's words, and the regulariser that keeps the maps on the object (from
Mix-of-Show, as in CIDM's code).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.context import Context
from ..model.processor import AttentionProcessor, HostAttention, SiteCall
from ..model.sites import Site, grid_of

FINEST = 256     # cells of the finest recorded grid; a sixteenth of large latents


def finest(latent: tuple[int, int]) -> int:
    """Cells of the finest grid whose maps are recorded, for a latent of height x width."""
    return max(FINEST, latent[0] * latent[1] // 16)


def coarse(site: Site, x: Tensor, latent: tuple[int, int], most: int) -> Tensor | None:
    """Features of a site on a grid that is coarse enough to record maps.

    A UNet has coarse sites, so its finer ones are left out. A transformer's sites all have one grid, which is
    averaged over 2x2 cells until it is coarse enough.

    Args:
        site: The site.
        x: Queries, or what they are projected from, `[B, S, c]`.
        latent: Height and width of the latent.
        most: Cells of the finest allowed grid.

    Returns:
        `[B, S', c]` with S' at most `most`; None for a fine site of a UNet.
    """
    if x.shape[1] <= most:
        return x
    if not site.of_transformer:
        return None
    grid = x.transpose(1, 2).unflatten(-1, grid_of(x.shape[1], *latent))
    while grid.shape[-2] * grid.shape[-1] > most:
        grid = F.avg_pool2d(grid, 2, ceil_mode=True, count_include_pad=False)
    return grid.flatten(2).transpose(1, 2)


def attention_maps(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """softmax(QK^T / sqrt d), averaged over heads: query `[B, S, a]` and key `[B, N, a]` to `[B, S, N]`."""
    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    q, k = split(query), split(key)
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1).mean(1)


class MapProcessor(AttentionProcessor):
    """Wraps another attention processor and records the maps of the last forward pass, with gradient."""

    def __init__(self, inner: AttentionProcessor) -> None:
        self.inner, self.recording = inner, True
        self.maps: list[Tensor] = []

    def prepare(self, context: Context) -> None:
        self.inner.prepare(context)
        self.maps, self.recording = [], True

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        return self.inner.project(site, projection, x, y)

    def attend(self, call: SiteCall, query: Tensor, key: Tensor, value: Tensor,
               attention: HostAttention) -> Tensor:
        # also when a block is recomputed, because it must give the same result
        maps = attention_maps(query, key, call.site.heads)
        if self.recording:
            self.maps.append(maps)
        return self.inner.attend(call, query, key, value, attention)

    def take(self) -> list[Tensor]:
        """Returns the maps of the last forward pass, `[B, S, N]` per site, and stops recording until the next
        one.
        """
        maps, self.maps, self.recording = self.maps, [], False
        return maps


def attention_regulariser(maps: list[Tensor], positions: Sequence[tuple[int, ...]],
                          masks: Tensor) -> Tensor | None:
    """MSE(map of the second word, mask) + mean(map of the first word outside the mask), summed over
    resolutions.

    Mix-of-Show (Gu et al., 2023), as in CIDM's code. Maps are averaged over the sites of a resolution and
    divided by their maximum. The mean over an empty outside is NaN, and the code then drops both terms. So a
    sample whose mask covers the whole picture at some resolution has no regulariser here either: the first
    term alone would only make the attention to the noun uniform.

    Args:
        maps: `[B, S, N]` per site, see `MapProcessor`.
        positions: Per sample, the token positions of the concept's words. Samples with fewer than two words
            are skipped.
        masks: Of the object, `[B, 1, h, w]` in 0..1.

    Returns:
        The mean loss of the samples, or None if all are skipped.
    """
    rows = [i for i, words in enumerate(positions) if len(words) >= 2]
    if not rows or not maps:
        return None
    first = torch.tensor([positions[i][0] for i in rows], device=masks.device)
    second = torch.tensor([positions[i][1] for i in rows], device=masks.device)
    by_cells: dict[int, list[Tensor]] = {}
    for m in maps:
        by_cells.setdefault(m.shape[1], []).append(m[rows].float())
    losses = torch.zeros(len(rows), device=masks.device)
    has_outside = torch.ones(len(rows), dtype=torch.bool, device=masks.device)
    for cells, group in by_cells.items():
        mean = torch.stack(group).mean(0)
        mask = F.interpolate(masks[rows].float(), grid_of(cells, *masks.shape[-2:]), mode="area").flatten(1)
        one, two = (mean.gather(2, at.view(-1, 1, 1).expand(-1, cells, 1)).squeeze(2)
                    for at in (first, second))
        one, two = (m / m.amax(1, keepdim=True).clamp(min=1e-6) for m in (one, two))
        outside = (mask < 0.5).float()
        has_outside &= outside.any(1)
        losses = losses + (two - mask).square().mean(1) + (one * outside).sum(1) / outside.sum(1).clamp(min=1)
    return losses[has_outside].mean() if bool(has_outside.any()) else None

"""A region is a box or mask with its own prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConceptError

Box = tuple[float, float, float, float]      # top, left, bottom, right, as fractions of the picture
OVERLAPS = ("average", "priority", "nearest")
FINE = 8      # soft edges are computed on a grid finer by this factor


@dataclass(frozen=True)
class Region:
    """A part of the picture with its own prompt.

    Args:
        prompt: May name concepts, such as `<rex>`.
        box: Its top, left, bottom and right as fractions of the picture.
        mask: `[H, W]` in 0..1, instead of the box.
        negative: Its negative prompt; empty = the scene's.
        strength: Weight of the region relative to the scene, 0..1.
        start, end: The part of the sampling in which the region is active: 0 = the first step, 1 = the last.
        feather: Width of the soft edge as a fraction of the picture's smaller side; 0 = hard edge.

    Raises:
        ConceptError: A value is out of range, or the region has neither box nor mask, or both.
    """

    prompt: str
    box: Box | None = None
    mask: Tensor | None = None
    negative: str = ""
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    feather: float = 0.0

    def __post_init__(self) -> None:
        if (self.box is None) == (self.mask is None):
            raise ConceptError(f"region '{self.prompt}' needs a box or a mask, one of the two")
        if self.box is not None:
            top, left, bottom, right = self.box
            if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
                edges = f"left {left:g}, top {top:g}, right {right:g}, bottom {bottom:g}"
                raise self._wrong("box", edges, "fractions top < bottom and left < right in 0..1")
        if not 0 <= self.strength <= 1:
            raise self._wrong("strength", self.strength, "0 to 1")
        if not 0 <= self.start <= self.end <= 1:
            raise ConceptError(f"start and end of region '{self.prompt}' are {self.start} and {self.end}; "
                               "allowed: 0 <= start <= end <= 1")
        if not 0 <= self.feather <= 0.5:
            raise self._wrong("feather", self.feather, "0 to 0.5 of the picture's smaller side")

    def _wrong(self, name: str, value: object, allowed: str) -> ConceptError:
        return ConceptError(f"{name} of region '{self.prompt}' is {value}; allowed: {allowed}")

    def active(self, progress: float) -> bool:
        """Whether the region is active at this share of the sampling."""
        return self.start <= progress <= self.end


def box_mask(box: Box, height: int, width: int) -> Tensor:
    """Mask of the cells that a box covers, `[height, width]` of 0 and 1.

    A side covers cells from the ceil of its start to the floor of its end, as in Mix-of-Show. If this leaves
    no cell on a coarse grid, the box covers the cell at its centre, so that small regions also act at the
    deepest level.
    """
    top, left, bottom, right = box
    rows = _cells(top, bottom, height)
    columns = _cells(left, right, width)
    mask = torch.zeros(height, width)
    mask[rows[0]:rows[1], columns[0]:columns[1]] = 1.0
    return mask


def _cells(start: float, end: float, size: int) -> tuple[int, int]:
    # Rounding errors must not shift a box by a cell (0.3 * 10 = 3.0000000000000004).
    first, last = math.ceil(start * size - 1e-6), math.floor(end * size + 1e-6)
    if first < last:
        return first, last
    centre = min(size - 1, int((start + end) / 2 * size))
    return centre, centre + 1


def region_mask(region: Region, height: int, width: int) -> Tensor:
    """A region's mask on a grid, `[height, width]` in 0..1.

    A box covers whole cells; a mask is averaged over each cell's area. A soft edge is first computed on a
    finer grid, so that it looks the same on every grid.
    """
    if region.box is not None and region.feather == 0:
        return box_mask(region.box, height, width)
    fine = (cast(Tensor, region.mask).float() if region.box is None      # either box or mask is given
            else box_mask(region.box, FINE * height, FINE * width))
    if region.feather > 0:
        fine = _soften(_resized(fine, FINE * height, FINE * width), region.feather)
    return _resized(fine, height, width).clamp(0, 1)


def _resized(mask: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(mask[None, None], (height, width), mode="area")[0, 0]


def _soften(mask: Tensor, feather: float) -> Tensor:
    """Softens a mask `[H, W]`: the edge is about `feather` times the smaller side. Blurs with a Gaussian; the
    edge spans two sigmas on each side.
    """
    sigma = feather * min(mask.shape) / 4
    reach = math.ceil(3 * sigma)
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
    line = (line / line.sum()).view(1, 1, 1, -1)
    x = F.pad(mask[None, None], (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(x, line), line.transpose(2, 3))[0, 0]


def masks_of(regions: Sequence[Region], height: int, width: int, feathered: bool = True) -> Tensor:
    """Masks `[U, height, width]`, each times its region's strength. feathered: whether to draw soft edges."""
    regions = regions if feathered else [replace(region, feather=0.0) for region in regions]
    return torch.stack([region.strength * region_mask(region, height, width) for region in regions])


def regions_in(regions: Sequence[Region], frame: tuple[int, int], area: Sequence[int]) -> list[Region]:
    """The regions as a part of the frame sees them.

    Args:
        frame: Height and width of the whole latent.
        area: Height, width, top and left of the part, in cells.
    """
    height, width, top, left = area
    parts = [region_mask(region, *frame)[top:top + height, left:left + width] for region in regions]
    return [replace(region, box=None, mask=part, feather=0.0)
            for region, part in zip(regions, parts, strict=True)]


def shares(masks: Tensor, overlap: str = "average") -> tuple[Tensor, Tensor]:
    """The shares of the regions and the scene in every cell.

    If regions cover a cell only partly, the scene gets the rest.

    Args:
        masks: `[U, ...]` in 0..1; `[U, ..., h, w]` for `nearest`.
        overlap: Which region gets the cells where regions overlap. `average`: all, with equal shares
            (Mix-of-Show). `priority`: the first region in the list. `nearest`: the region with the nearest
            centre; at equal distance the smaller one.

    Returns:
        The regions' shares `[U, ...]` and the scene's `[...]`; together they are 1 in every cell.

    Raises:
        ConceptError: `overlap` is unknown.
    """
    if overlap not in OVERLAPS:
        raise ConceptError(f"overlap is {overlap!r}; allowed: {', '.join(OVERLAPS)}")
    if overlap == "priority":
        free = (1 - masks).cumprod(0)
        above = torch.cat([torch.ones_like(masks[:1]), free[:-1]])
        return masks * above, free[-1] if len(masks) else torch.ones(masks.shape[1:])
    total = masks.sum(0)
    if overlap == "nearest" and len(masks):
        nearest = _distances(masks).argmin(0, keepdim=True)
        region_share = torch.zeros_like(masks).scatter_(0, nearest, total.clamp(max=1.0).unsqueeze(0))
        return region_share, (1 - total).clamp(min=0.0)
    return masks / total.clamp(min=1.0), (1 - total).clamp(min=0.0)


def _distances(masks: Tensor) -> Tensor:
    """Squared distances `[U, ..., h, w]` from every cell to the centre of every mask.

    Ties: a larger mask gets a slightly larger distance. Where a mask is 0, the distance is infinite.
    """
    height, width = masks.shape[-2:]
    rows, columns = torch.arange(height).to(masks).view(-1, 1), torch.arange(width).to(masks).view(1, -1)
    area = masks.sum((-2, -1), keepdim=True).clamp(min=1e-6)
    centre = [(masks * places).sum((-2, -1), keepdim=True) / area for places in (rows, columns)]
    squared = (rows - centre[0]).square() + (columns - centre[1]).square()
    return (squared + 1e-3 * area / (height * width)).masked_fill(masks == 0, torch.inf)


def pooled_of(regions: Sequence[Region], scene: Tensor, own: Sequence[Tensor], latent: tuple[int, int],
              overlap: str) -> Tensor:
    """The pooled text of a picture with regions, for SDXL, whose UNet takes a single one.

    This is the mean of the pooled texts of scene and regions, weighted by area, strength and active part of
    the sampling. It is our own rule: others use only the scene's pooled text, which may name no concept.

    Args:
        scene: The scene's pooled text `[B, P]`.
        own: The regions' pooled texts, `[B, P]` each.
        latent: Height and width of the latents.
    """
    region_share, _ = shares(masks_of(regions, *latent), overlap)
    weights = [float(share.mean()) * (region.end - region.start)
               for share, region in zip(region_share, regions, strict=True)]
    mixed = sum(weight * pooled for weight, pooled in zip(weights, own, strict=True))
    return (1 - sum(weights)) * scene + mixed

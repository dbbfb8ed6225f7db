"""Regions: a mask or box with its own prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConceptError

OVERLAPS = ("average", "priority", "nearest")
FINE = 8      # soft edges are drawn this many times finer than the grid


@dataclass(frozen=True)
class Region:
    """box: top, left, bottom, right as fractions of the picture; or mask `[H, W]` in 0..1 (one of the two).

    prompt and negative may hold placeholders; strength 0..1 blends the region over the scene; start and end:
    part of the sampling in which it is on (0 = first step, 1 = last); feather: width of the soft edge as a
    share of the picture's smaller side, 0 = hard.
    """

    prompt: str
    box: tuple[float, float, float, float] | None = None
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
                raise ConceptError(f"box of region '{self.prompt}' is {self.box}; allowed: fractions top < bottom and left < right in 0..1")
        if not 0 <= self.strength <= 1:
            raise ConceptError(f"strength of region '{self.prompt}' is {self.strength}; allowed: 0 to 1")
        if not 0 <= self.start <= self.end <= 1:
            raise ConceptError(f"start and end of region '{self.prompt}' are {self.start} and {self.end}; allowed: 0 <= start <= end <= 1")
        if not 0 <= self.feather <= 0.5:
            raise ConceptError(f"feather of region '{self.prompt}' is {self.feather}; allowed: 0 to 0.5 of the picture's smaller side")

    def active(self, progress: float) -> bool:
        return self.start <= progress <= self.end


def box_mask(box: tuple[float, float, float, float], height: int, width: int) -> Tensor:
    """Cells of a grid that a box covers, `[height, width]` of 0 and 1: ceil of the start to floor of the end
    (Mix-of-Show).

    A box too small for that at a coarse grid keeps the cell at its centre, so that small regions survive at
    the deepest level.
    """
    top, left, bottom, right = box
    rows = _cells(top, bottom, height)
    columns = _cells(left, right, width)
    mask = torch.zeros(height, width)
    mask[rows[0]:rows[1], columns[0]:columns[1]] = 1.0
    return mask


def _cells(start: float, end: float, size: int) -> tuple[int, int]:
    # A fraction that is a whole cell up to rounding (0.3 * 10 = 3.0000000000000004) counts as that cell.
    first, last = math.ceil(start * size - 1e-6), math.floor(end * size + 1e-6)
    if first < last:
        return first, last
    centre = min(size - 1, int((start + end) / 2 * size))
    return centre, centre + 1


def region_mask(region: Region, height: int, width: int) -> Tensor:
    """A region's mask on a grid: boxes by cells, masks by area; soft edges are drawn finely first, the same
    for every grid."""
    if region.box is not None and region.feather == 0:
        return box_mask(region.box, height, width)
    fine = region.mask.float() if region.mask is not None else box_mask(region.box, FINE * height, FINE * width)
    if region.feather > 0:
        fine = _soften(F.interpolate(fine[None, None], (FINE * height, FINE * width), mode="area")[0, 0], region.feather)
    return F.interpolate(fine[None, None], (height, width), mode="area")[0, 0].clamp(0, 1)


def _soften(mask: Tensor, feather: float) -> Tensor:
    """`[H, W]` with edges of about `feather` times the smaller side: a Gaussian whose two sigmas on each side
    are the edge."""
    sigma = feather * min(mask.shape) / 4
    reach = math.ceil(3 * sigma)
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
    line = (line / line.sum()).view(1, 1, 1, -1)
    x = F.pad(mask[None, None], (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(x, line), line.transpose(2, 3))[0, 0]


def masks_of(regions: Sequence[Region], height: int, width: int, feathered: bool = True) -> Tensor:
    """`[U, height, width]`, each times its region's strength; without their soft edges where these are not
    wanted."""
    regions = regions if feathered else [replace(region, feather=0.0) for region in regions]
    return torch.stack([region.strength * region_mask(region, height, width) for region in regions])


def shares(masks: Tensor, overlap: str = "average") -> tuple[Tensor, Tensor]:
    """What each region and the scene contribute at every cell: masks and regions `[U, ...]`, scene `[...]`;
    they sum to 1.

    Where regions lie over each other: `average`: by count (Mix-of-Show); `priority`: the one that comes first
    in the list lies on top; `nearest`: the one whose centre is nearest, of two as near the smaller one (for
    masks `[U, ..., h, w]`). Where regions cover a cell only in part, the scene keeps the rest.
    """
    if overlap not in OVERLAPS:
        raise ConceptError(f"overlap is {overlap!r}; allowed: {', '.join(OVERLAPS)}")
    if overlap == "priority":
        free = (1 - masks).cumprod(0)
        above = torch.cat([torch.ones_like(masks[:1]), free[:-1]])
        return masks * above, free[-1] if len(masks) else torch.ones(masks.shape[1:])
    total = masks.sum(0)
    if overlap == "nearest" and len(masks):
        own = torch.zeros_like(masks).scatter_(0, _distances(masks).argmin(0, keepdim=True), total.clamp(max=1.0).unsqueeze(0))
        return own, (1 - total).clamp(min=0.0)
    return masks / total.clamp(min=1.0), (1 - total).clamp(min=0.0)


def _distances(masks: Tensor) -> Tensor:
    """`[U, ..., h, w]`: squared, from every cell to the centre of every mask, a little more for large ones;
    infinite where no mask is."""
    height, width = masks.shape[-2:]
    rows, columns = torch.arange(height).to(masks).view(-1, 1), torch.arange(width).to(masks).view(1, -1)
    area = masks.sum((-2, -1), keepdim=True).clamp(min=1e-6)
    centre = [(masks * places).sum((-2, -1), keepdim=True) / area for places in (rows, columns)]
    far = (rows - centre[0]).square() + (columns - centre[1]).square() + 1e-3 * area / (height * width)
    return far.masked_fill(masks == 0, torch.inf)


def pooled_of(regions: Sequence[Region], scene: Tensor, own: Sequence[Tensor], latent: tuple[int, int], overlap: str) -> Tensor:
    """The pooled text `[B, P]` of a picture with regions: SDXL's UNet takes one, so it is the mean of the
    scene's and the regions' own by area, strength and the part of the sampling in which they are on. Ours:
    others keep the scene's, which may name nobody."""
    region_share, _ = shares(masks_of(regions, *latent), overlap)
    weights = [float(share.mean()) * (region.end - region.start) for share, region in zip(region_share, regions, strict=True)]
    return (1 - sum(weights)) * scene + sum(weight * pooled for weight, pooled in zip(weights, own, strict=True))

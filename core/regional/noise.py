"""Region noise estimation: RNE of CIDM (Sec. 3.4, Eq. 5).

The paper estimates every region's noise over the full frame: one more evaluation per region and step. What lies outside the region's mask
is not used, so the thing that the region's prompt names may be drawn where nobody sees it. Ours, `area="crop"`, looks at a window of the
region's own size: it costs by area, and the thing has no other place to be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConceptError
from .regions import shares

OUTSIDE = ("keep", "literal")
AREAS = ("frame", "crop")
LEAST, MULTIPLE = 0.5, 8      # a window's sides: at least that share of the latent's smaller side; multiples of so many cells


@dataclass(frozen=True)
class NoiseSettings:
    """is_on: region noise estimation, with alpha, outside and area as below; solo: share of the first steps in which every region is drawn
    alone on its window, with nothing of the scene in it, whether region noise is on or not: what it names cannot but be there."""

    is_on: bool = False
    alpha: float = 0.1
    outside: str = "keep"
    area: str = "frame"
    solo: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or not 0 <= self.solo <= 1:
            raise ConceptError(f"alpha and solo are {self.alpha} and {self.solo}; allowed: 0 to 1")
        if self.outside not in OUTSIDE or self.area not in AREAS:
            raise ConceptError(f"outside and noise_area are {self.outside!r} and {self.area!r}; "
                               f"allowed: {' or '.join(OUTSIDE)}, {' or '.join(AREAS)}")


@dataclass(frozen=True)
class Window:
    """Rows and columns of a latent, first and one behind the last."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left

    def cut(self, x: Tensor) -> Tensor:
        return x[..., self.top:self.bottom, self.left:self.right].contiguous()

    def back(self, part: Tensor, like: Tensor) -> Tensor:
        """The part in its place in zeros `[..., h, w]` of the whole's size."""
        whole = torch.zeros_like(like)
        whole[..., self.top:self.bottom, self.left:self.right] = part
        return whole


def _span(first: int, last: int, size: int, least: int) -> tuple[int, int]:
    """Cells first to last, at least so many, a multiple of MULTIPLE; the whole side where it is no larger than that."""
    length = min(size, -(-max(last - first, least) // MULTIPLE) * MULTIPLE)
    start = min(max(0, (first + last - length + 1) // 2), size - length)
    return start, start + length


def window_of(mask: Tensor) -> Window:
    """The window of a mask `[h, w]` of a latent, as small as may be: on what is far smaller than it knows a UNet draws little."""
    height, width = mask.shape
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    if not len(rows):
        return Window(0, 0, height, width)
    least = round(LEAST * min(height, width))
    spans = [_span(int(found[0]), int(found[-1]) + 1, size, least) for found, size in ((rows, height), (columns, width))]
    return Window(spans[0][0], spans[1][0], spans[0][1], spans[1][1])


def windows_of(masks: Tensor, is_cut: bool) -> list[Window]:
    """Of each of the masks `[U, h, w]`: its window, or the full frame."""
    return [window_of(mask) if is_cut else Window(0, 0, *masks.shape[-2:]) for mask in masks]


def together(windows: Sequence[Window], most: int) -> list[list[int]]:
    """Numbers of the windows that are evaluated as one batch: they have one size, and no more cells in all than `most`, the picture's."""
    groups: list[list[int]] = []
    for i, window in enumerate(windows):
        for group in groups:
            if windows[group[0]].size == window.size and (len(group) + 1) * math.prod(window.size) <= most:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def scene_is_seen(masks: Tensor, overlap: str = "average") -> bool:
    """Whether regions with these masks `[U, h, w]` leave any of the picture to the scene."""
    return bool((shares(masks, overlap)[1] > 1e-3).any())


def region_noise(scene: Tensor, regions: Tensor, masks: Tensor, alpha: float = 0.1, outside: str = "keep",
                 overlap: str = "average") -> Tensor:
    """E* from the scene's guided noise and each region's own.

    scene `[B, C, h, w]`: E, already guided; regions `[U, B, C, h, w]`: E_u, likewise; masks `[U, h, w]` in 0..1; alpha: share of the
    scene's estimate inside regions (0.1 in the paper); overlap: as in regions.shares.

    outside="literal" is Eq. 5: alpha E + sum_u (1 - alpha) E_u m_u, which leaves only alpha E where no box is; "keep", our default:
    E* = E there, and inside alpha E + (1 - alpha) mean_u E_u. With no region both readings of "keep" give plain guidance.
    """
    if outside not in OUTSIDE:
        raise ConceptError(f"region noise outside boxes is {outside!r}; allowed: {', '.join(OUTSIDE)}")
    if len(regions) == 0:
        return scene
    masks = masks.to(scene)
    if outside == "literal":
        return alpha * scene + (1 - alpha) * (regions * masks[:, None, None]).sum(0)
    region_share, scene_share = shares(masks, overlap)
    inside = (regions * region_share[:, None, None]).sum(0)
    covered = 1 - scene_share
    return scene * (scene_share + alpha * covered) + (1 - alpha) * inside

"""Region noise estimation: RNE of CIDM (Sec. 3.4, Eq. 5).

The paper estimates every region's noise over the full frame: one more evaluation per region and step. Ours, `area="crop"`, does it on the
region's surroundings alone, so that it costs by area; what lies outside the region's mask is not used in either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConceptError
from .regions import shares

OUTSIDE = ("keep", "literal")
AREAS = ("frame", "crop")
MARGIN, LEAST, MULTIPLE = 0.125, 0.5, 8      # of the smaller side: around the region, and at least; cells that sides are multiples of


@dataclass(frozen=True)
class Window:
    """Rows and columns of a latent, first and one behind the last."""

    top: int
    left: int
    bottom: int
    right: int

    def cut(self, x: Tensor) -> Tensor:
        return x[..., self.top:self.bottom, self.left:self.right].contiguous()

    def back(self, part: Tensor, like: Tensor) -> Tensor:
        """The part in its place in zeros `[..., h, w]` of the whole's size."""
        whole = torch.zeros_like(like)
        whole[..., self.top:self.bottom, self.left:self.right] = part
        return whole


def _span(first: int, last: int, size: int, margin: int, least: int) -> tuple[int, int]:
    """Cells first to last with a margin, at least so many, a multiple of MULTIPLE; the whole side where it is no larger than that."""
    wanted = max(last - first + 2 * margin, least)
    length = min(size, -(-wanted // MULTIPLE) * MULTIPLE)
    start = min(max(0, (first + last - length + 1) // 2), size - length)
    return start, start + length


def window_of(mask: Tensor) -> Window:
    """The surroundings of a mask `[h, w]` of a latent: what region noise is estimated on."""
    height, width = mask.shape
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    if not len(rows):
        return Window(0, 0, height, width)
    margin, least = round(MARGIN * min(height, width)), round(LEAST * min(height, width))
    spans = [_span(int(found[0]), int(found[-1]) + 1, size, margin, least) for found, size in ((rows, height), (columns, width))]
    return Window(spans[0][0], spans[1][0], spans[0][1], spans[1][1])


def region_noise(scene: Tensor, regions: Tensor, masks: Tensor, alpha: float = 0.1, outside: str = "keep") -> Tensor:
    """E* from the scene's guided noise and each region's own.

    scene `[B, C, h, w]`: E, already guided; regions `[U, B, C, h, w]`: E_u, likewise; masks `[U, h, w]` in 0..1; alpha: share of the
    scene's estimate inside regions (0.1 in the paper).

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
    region_share, scene_share = shares(masks)
    inside = (regions * region_share[:, None, None]).sum(0)
    covered = 1 - scene_share
    return scene * (scene_share + alpha * covered) + (1 - alpha) * inside

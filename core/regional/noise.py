"""Region noise estimation: RNE of CIDM (Sec. 3.4, Eq. 5)."""

from __future__ import annotations

from torch import Tensor

from ..errors import ConceptError
from .regions import shares

OUTSIDE = ("keep", "literal")


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

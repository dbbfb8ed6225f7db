"""Region noise estimation: RNE of CIDM (Sec. 3.4, Eq. 5).

The paper estimates each region's noise over the whole frame, with one more evaluation per region and step.
The estimate outside the region's mask is discarded, so the object may be drawn there and get cut off. Our
variant, `area="crop"`, estimates the noise on a crop of the region's size. Its cost is proportional to the
area, and the object must appear inside the crop.

For a base of flow matching the estimates are velocities.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import ConceptError
from .regions import shares

OUTSIDE = ("keep", "literal")
AREAS = ("frame", "crop")


@dataclass(frozen=True)
class NoiseSettings:
    """Which steps evaluate regions alone, and how.

    Args:
        is_on: Whether region noise estimation is used.
        alpha: Share of the scene's estimate inside regions, 0 to 1; 0.1 in the paper.
        outside: The estimate outside regions, `keep` or `literal`, see `region_noise`.
        area: Whether a region's noise is estimated on the whole `frame` or on its `crop`.
        crop_denoising: Share of the first steps in which each region is denoised alone on its crop, without
            the scene. It does not depend on `is_on`.
    """

    is_on: bool = False
    alpha: float = 0.1
    outside: str = "keep"
    area: str = "frame"
    crop_denoising: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or not 0 <= self.crop_denoising <= 1:
            raise ConceptError(f"alpha and solo are {self.alpha} and {self.crop_denoising}; allowed: 0 to 1")
        if self.outside not in OUTSIDE or self.area not in AREAS:
            raise ConceptError(f"outside and noise_area are {self.outside!r} and {self.area!r}; "
                               f"allowed: {' or '.join(OUTSIDE)}, {' or '.join(AREAS)}")


def scene_is_seen(masks: Tensor, overlap: str = "average") -> bool:
    """Whether regions with these masks `[U, h, w]` leave part of the picture uncovered."""
    return bool((shares(masks, overlap)[1] > 1e-3).any())


def region_noise(scene: Tensor, regions: Tensor, masks: Tensor, alpha: float = 0.1, outside: str = "keep",
                 overlap: str = "average") -> Tensor:
    """Mixes the scene's noise estimate with the regions' own.

    outside="literal" is Eq. 5: alpha E + sum_u (1 - alpha) E_u m_u. Outside all boxes this leaves only alpha
    E. Our default, "keep", gives E outside and alpha E + (1 - alpha) mean_u E_u inside. Without regions this
    is plain guidance.

    Args:
        scene: E `[B, C, h, w]`, with guidance applied.
        regions: E_u `[U, B, C, h, w]`, likewise.
        masks: m_u `[U, h, w]` in 0..1.
        alpha: Share of the scene's estimate inside regions; 0.1 in the paper.
        outside: `keep` or `literal`.
        overlap: As in `regions.shares`; not used by "literal".

    Returns:
        E* `[B, C, h, w]`.

    Raises:
        ConceptError: `outside` is neither of the two.
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

"""Measures whether photos are blurred, of one colour or nearly alike.

The thresholds come from the 55 photos of the CIFC benchmark. Sharpness at 512 pixels was 0.06 to 0.26;
blurred by 2 pixels, 91 % of them were below 0.03. Two photos of one concept had a similarity of at most 0.84;
copies in half the size had 1.00, brighter ones or ones without a margin of 2 % had 0.90 to 1.00.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..images import to_pil
from .framing import resized

BLURRED = 0.03      # sharpness below this
ALIKE = 0.97      # similarity from this on
SIDE = 512      # shorter side at which sharpness is measured if the resolution is not known
THUMBNAIL = 192      # longer side of thumbnails
PATTERN = 16      # photos are compared as grey pictures of this side
FLAT = 1.5      # standard deviation of brightness, of 255
ROUGH_SIDE = 48      # shorter side at which roughness is measured; noise and JPEG's traces are averaged out
# A pixel bends by how far its brightness is from the middle of its neighbours, as a share of the contrast.
# Colour gradients do not bend, outlines bend much, photos have many pixels between these two.
BENDS = (0.08, 0.4)
STEPS = 2      # of 256 levels; rounding a colour gradient makes smaller bends
LEAST_INSIDE = 8      # rows and columns; fewer are not measured
SAME = 12      # of 256; a margin's colour may differ by this much
# Mean roughness from this on. The photos of a concept of CIFC have 0.17 or more; in the dark, in fog or on a
# white page nearly all have 0.13 or more. Drawn scenes, colour gradients, scribbles and dots have less, but
# for some that were saved as JPEG in 64 pixels.
PHOTO_ROUGHNESS = 0.13


@dataclass(frozen=True)
class Quality:
    """sharpness: share of the contrast that halving the picture loses; None for pictures of one colour.
    pattern: `[256]`, brightness of the picture at 16x16, normalised. thumbnail: for contact sheets.
    roughness: share of pixels with the fine texture that photos have, and drawings lack."""

    sharpness: float | None
    pattern: Tensor
    thumbnail: Image.Image
    roughness: float = 0.0


def measure(pixels: Tensor, resolution: int | None = None) -> Quality:
    """Measures a photo.

    Args:
        pixels: `[3, H, W]` in -1..1, or 8 bits.
        resolution: Shorter side at which sharpness counts, in pixels; None = 512. Smaller photos are measured
            as they are.
    """
    height, width = pixels.shape[1:]
    side = resolution or SIDE
    scale = min(1.0, side / min(height, width))
    small = resized(pixels, _scaled(height, width, scale), mode="bilinear")
    image = to_pil(small)
    grey = image.convert("L")
    thumbnail = image.copy()
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    pattern = torch.from_numpy(_array(grey.resize((PATTERN, PATTERN), Image.Resampling.BOX)).flatten())
    pattern = pattern - pattern.mean()
    contrast = _array(grey).std()
    sharpness = None
    if contrast > FLAT:
        half = grey.resize((max(1, grey.width // 2), max(1, grey.height // 2)), Image.Resampling.BOX)
        lost = _array(grey) - _array(half.resize(grey.size, Image.Resampling.BICUBIC))
        sharpness = float(lost.std() / contrast)
    return Quality(sharpness, pattern / pattern.norm().clamp(min=1e-6), thumbnail, roughness(image))


def roughness(image: Image.Image) -> float:
    """Share of pixels that bend as photos do, and are not beside an outline. The margin does not count."""
    scale = ROUGH_SIDE / min(image.size)
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BOX)
    grey = _array(Image.fromarray(_without_margin(np.asarray(image))).convert("L"))
    if min(grey.shape) < LEAST_INSIDE:
        return 0.0      # a strip has too few neighbours
    darkest, brightest = np.percentile(grey, (1, 99))
    middle = grey[1:-1, 1:-1]
    bends = abs(grey[1:-1, 2:] - 2 * middle + grey[1:-1, :-2]) + abs(grey[2:, 1:-1] - 2 * middle
                                                                     + grey[:-2, 1:-1])
    least, outline = (share * max(float(brightest - darkest), 1.0) for share in BENDS)
    height, width = bends.shape
    near = np.pad(bends > outline, 1)
    beside = np.any([near[y:y + height, x:x + width] for y in range(3) for x in range(3)], axis=0)
    return float(((bends > max(least, STEPS)) & ~beside).mean())


def _without_margin(levels: np.ndarray) -> np.ndarray:
    """Cuts off the rows and columns at the border that have its colour, but for a fiftieth of their pixels.
    A picture of one colour stays whole."""
    border = np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
    differs = (abs(levels.astype(int) - np.median(border, axis=0)) > SAME).any(axis=2)
    rows, columns = (np.flatnonzero(differs.mean(axis=axis) > 0.02) for axis in (1, 0))
    if min(len(rows), len(columns)) < LEAST_INSIDE:
        return levels
    return levels[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]


def _scaled(height: int, width: int, scale: float) -> tuple[int, int]:
    # strips are cut to a usable length by scaling them down further
    scale = min(scale, 4096 / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32)


def alike(qualities: Sequence[Quality]) -> list[list[int]]:
    """Groups of photos that are nearly alike, each as indices in order; photos of one colour are left out."""
    usable = [i for i, quality in enumerate(qualities) if quality.sharpness is not None]
    if not usable:
        return []
    patterns = torch.stack([qualities[i].pattern for i in usable])
    group = {i: [i] for i in usable}
    for row, column in (patterns @ patterns.T >= ALIKE).triu(1).nonzero().tolist():
        i, j = usable[row], usable[column]
        if group[i] is not group[j]:
            merged = sorted(group[i] + group[j])
            group |= dict.fromkeys(merged, merged)
    return [members for i, members in group.items() if members[0] == i and len(members) > 1]

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
LEVELS = 16      # of grey, of 256
# Mean flatness from this on. Drawn scenes of 64 and 128 pixels have 0.83 or more, as JPEG 0.69 or more; the
# photos of a concept of CIFC at most 0.53. Noise, size and lack of colour hardly change it.
DRAWN_FLATNESS = 0.63


@dataclass(frozen=True)
class Quality:
    """sharpness: share of the contrast that halving the picture loses; None for pictures of one colour.
    pattern: `[256]`, brightness of the picture at 16x16, normalised. thumbnail: for contact sheets. flatness:
    share of pixels in the 16 most common of 256 levels of grey."""

    sharpness: float | None
    pattern: Tensor
    thumbnail: Image.Image
    flatness: float = 1.0


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
    levels = np.sort(grey.histogram())
    flatness = float(levels[-LEVELS:].sum() / levels.sum())
    return Quality(sharpness, pattern / pattern.norm().clamp(min=1e-6), thumbnail, flatness)


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

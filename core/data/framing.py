"""Turns photos of any shape into training pictures: squares, or buckets of similar area."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConceptError

FRAMINGS = ("crop", "pad", "buckets")
LONGEST_SIDE = 2      # longest side of a bucket, in multiples of the resolution
# Pictures whose aspect ratio differs from the frame's by more than this factor are cropped before resizing.
MOST_ELONGATED = 4


@dataclass(frozen=True)
class Picture:
    """A training photo.

    pixels: `[3, H, W]` in -1..1; caption: may be empty; mask: `[1, H, W]` in 0..1, weights of the loss, or
    None; is_prior: whether it is a prior-preservation picture; digest: see `photos.photo_digest`.
    """

    pixels: Tensor
    caption: str = ""
    mask: Tensor | None = None
    is_prior: bool = False
    digest: str = ""


@dataclass(frozen=True)
class Framing:
    """How pictures of any shape are converted to about `resolution` squared pixels.

    mode: "crop" fills the square; "pad" fits the whole picture on grey and masks the rest; "buckets" keeps
    the picture's shape approximately (see `bucket_of`) and never enlarges a picture. flip: also train on
    mirrored pictures.
    """

    resolution: int
    mode: str = "crop"
    flip: bool = True

    def __post_init__(self) -> None:
        if self.mode not in FRAMINGS:
            raise ConceptError(f"framing is {self.mode!r}; allowed: {', '.join(FRAMINGS)}")


def bucket_of(height: int, width: int, resolution: int, step: int) -> tuple[int, int]:
    """Chooses the bucket that keeps most of a picture.

    A bucket's sides are multiples of `step`. It has at most `resolution` squared pixels. No side is longer
    than the picture's, unless it is a single step. The chosen bucket maximises the visible share of the
    picture times the bucket's area; ties go to the larger share.

    Args:
        height, width: Size of the picture in pixels.

    Returns:
        Height and width of the bucket.
    """
    area = resolution**2

    def sides(length: int) -> range:
        return range(step, max(step, min(length, LONGEST_SIDE * resolution)) + 1, step)

    def quality(size: tuple[int, int]) -> tuple[float, float]:
        tall, wide = size[0] / height, size[1] / width
        share = min(tall, wide) / max(tall, wide)
        # rounded, so that a rotated picture gets the rotated bucket
        return round(share * (size[0] * size[1]) / area, 9), round(share, 9)

    sizes = [(tall, wide) for tall in sides(height) for wide in sides(width) if tall * wide <= area]
    return max(sizes, key=quality, default=(step, step))


def _without_far_ends(picture: Picture, tall: int, wide: int) -> Picture:
    """Crops a picture that is much longer than the frame to its middle. Other pictures are unchanged.

    Resizing a whole picture of 20,000 x 40 pixels would take gigabytes, and most of it would then be cropped.
    """
    def middle(length: int, longest: int) -> slice:
        first = max(0, (length - longest) // 2)
        return slice(first, length - first)

    height, width = picture.pixels.shape[1:]
    rows = middle(height, -(-MOST_ELONGATED * width * tall // wide))
    columns = middle(width, -(-MOST_ELONGATED * height * wide // tall))
    mask = None if picture.mask is None else picture.mask[:, rows, columns]
    return replace(picture, pixels=picture.pixels[:, rows, columns], mask=mask)


def frame(picture: Picture, framing: Framing, size: tuple[int, int] | None = None) -> Picture:
    """Crops, pads or resizes a picture to its frame.

    Args:
        size: Height and width of the frame in pixels; None = the square of `framing.resolution`.

    Returns:
        The picture with pixels `[3, *size]` and always a mask `[1, *size]` of the loss weights.
    """
    tall, wide = size or (framing.resolution, framing.resolution)
    if framing.mode != "pad":
        picture = _without_far_ends(picture, tall, wide)
    height, width = picture.pixels.shape[1:]
    ratio = (min if framing.mode == "pad" else max)(tall / height, wide / width)
    resized = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    pixels = F.interpolate(picture.pixels.unsqueeze(0), resized, mode="bicubic", antialias=True,
                           align_corners=False)
    mask = torch.ones(1, height, width) if picture.mask is None else picture.mask
    mask = F.interpolate(mask.unsqueeze(0), resized, mode="area")
    top, left = (resized[0] - tall) // 2, (resized[1] - wide) // 2
    margins = (max(0, -left), max(0, wide - resized[1] + left), max(0, -top), max(0, tall - resized[0] + top))
    rows, columns = slice(max(0, top), max(0, top) + tall), slice(max(0, left), max(0, left) + wide)
    pixels = F.pad(pixels.squeeze(0).clamp(-1, 1), margins)[:, rows, columns]      # 0 is grey
    return replace(picture, pixels=pixels, mask=F.pad(mask.squeeze(0), margins)[:, rows, columns])

"""Turns photos of any shape into training pictures: squares, or buckets of similar area."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConceptError
from .pictures import Picture, signed, weights

FRAMINGS = ("crop", "pad", "buckets")
LONGEST_SIDE = 2      # longest side of a bucket, in multiples of the resolution
# Pictures whose aspect ratio differs from the frame's by more than this factor are cropped before resizing.
MOST_ELONGATED = 4
ROWS = 256      # rows that are resized at once, to save memory


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


def _without_far_ends(size: tuple[int, int], tall: int, wide: int) -> tuple[slice, slice]:
    """Rows and columns of a picture that is cropped to its middle because it is much longer than the frame.
    Other pictures stay whole.

    Resizing a whole picture of 20,000 x 40 pixels would take gigabytes, and most of it would then be cropped.
    """
    def middle(length: int, longest: int) -> slice:
        first = max(0, (length - longest) // 2)
        return slice(first, length - first)

    height, width = size
    return (middle(height, -(-MOST_ELONGATED * width * tall // wide)),
            middle(width, -(-MOST_ELONGATED * height * wide // tall)))


def resized(pixels: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Resizes pixels with antialiasing.

    The width comes first, some rows at a time, because a large photo as float32 takes four times its memory.
    The result is the same bit for bit as that of one call.

    Args:
        pixels: `[C, H, W]`, in -1..1 or 8 bits.
        size: Height and width.

    Returns:
        `[C, *size]`, in about -1..1.
    """
    def interpolated(part: Tensor, to: tuple[int, int]) -> Tensor:
        return F.interpolate(part.unsqueeze(0), to, mode=mode, antialias=True, align_corners=False).squeeze(0)

    narrow = [interpolated(signed(rows), (rows.shape[1], size[1])) for rows in pixels.split(ROWS, 1)]
    return interpolated(torch.cat(narrow, 1), size)


def frame(picture: Picture, framing: Framing, size: tuple[int, int] | None = None) -> Picture:
    """Crops, pads or resizes a picture to its frame.

    Args:
        size: Height and width of the frame in pixels; None = the square of `framing.resolution`.

    Returns:
        The picture with pixels `[3, *size]` and always a mask `[1, *size]` of the loss weights.
    """
    tall, wide = size or (framing.resolution, framing.resolution)
    pixels, mask = picture.stored_pixels(), picture.stored_mask()
    if framing.mode != "pad":
        rows, columns = _without_far_ends(picture.size, tall, wide)
        pixels, mask = pixels[:, rows, columns], None if mask is None else mask[:, rows, columns]
    height, width = pixels.shape[1:]
    ratio = (min if framing.mode == "pad" else max)(tall / height, wide / width)
    full = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    pixels = resized(pixels, full)
    mask = torch.ones(1, 1, *full) if mask is None else F.interpolate(weights(mask).unsqueeze(0), full,
                                                                      mode="area")
    top, left = (full[0] - tall) // 2, (full[1] - wide) // 2
    margins = (max(0, -left), max(0, wide - full[1] + left), max(0, -top), max(0, tall - full[0] + top))
    rows, columns = slice(max(0, top), max(0, top) + tall), slice(max(0, left), max(0, left) + wide)
    pixels = F.pad(pixels.clamp(-1, 1), margins)[:, rows, columns]      # 0 is grey
    return replace(picture, source=pixels, mask=F.pad(mask.squeeze(0), margins)[:, rows, columns])

"""Pictures of any shape as pictures to learn from: squares, or the nearest of some shapes of about one area."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConceptError

FRAMINGS = ("crop", "pad", "buckets")
WIDEST = 2      # a bucket's side is at most so many times the resolution
FAR = 4         # times another shape than the frame's: of a longer picture the ends are cut off before it is resized


@dataclass(frozen=True)
class Picture:
    """pixels `[3, H, W]` in -1..1; caption may be empty; mask `[1, H, W]` in 0..1 or None; is_prior: a prior-preservation picture."""

    pixels: Tensor
    caption: str = ""
    mask: Tensor | None = None
    is_prior: bool = False
    digest: str = ""


@dataclass(frozen=True)
class Framing:
    """How pictures of any shape become pictures of about `resolution` squared pixels.

    "crop" fills the square; "pad" shows the whole picture on grey and masks the rest; "buckets" keeps the picture's shape as nearly as
    sides in steps allow (see bucket_of), and makes no picture larger than it is.
    """

    resolution: int
    mode: str = "crop"
    flip: bool = True

    def __post_init__(self) -> None:
        if self.mode not in FRAMINGS:
            raise ConceptError(f"framing is {self.mode!r}; allowed: {', '.join(FRAMINGS)}")


def bucket_of(height: int, width: int, resolution: int, step: int) -> tuple[int, int]:
    """Height and width of a picture's bucket: multiples of `step`, of at most `resolution` squared pixels, no side longer than the
    picture's (one step at least). Of all these the one that shows most: the share of the picture that is in it times its own size; of equal
    ones the one that cuts off less."""
    def sides(length: int) -> range:
        return range(step, max(step, min(length, WIDEST * resolution)) + 1, step)

    area = resolution**2

    def shown(size: tuple[int, int]) -> tuple[float, float]:
        tall, wide = size[0] / height, size[1] / width
        share = min(tall, wide) / max(tall, wide)
        return round(share * (size[0] * size[1]) / area, 9), round(share, 9)      # so that a picture on its side gets the same

    return max(((a, b) for a in sides(height) for b in sides(width) if a * b <= area), key=shown, default=(step, step))


def _middle(picture: Picture, tall: int, wide: int) -> Picture:
    """The middle of a picture that is far from the frame's shape; any other as it is. Enlarged to the frame's other side, 20,000 x 40
    pixels would be gigabytes, nearly all of it to be cut off."""
    def part(length: int, most: int) -> slice:
        first = max(0, (length - most) // 2)
        return slice(first, length - first)

    height, width = picture.pixels.shape[1:]
    cut = (slice(None), part(height, -(-FAR * width * tall // wide)), part(width, -(-FAR * height * wide // tall)))
    return replace(picture, pixels=picture.pixels[cut], mask=None if picture.mask is None else picture.mask[cut])


def frame(picture: Picture, framing: Framing, size: tuple[int, int] | None = None) -> Picture:
    """The picture in `size` (height and width; None: the square), with a mask that says which part counts."""
    tall, wide = size or (framing.resolution, framing.resolution)
    picture = picture if framing.mode == "pad" else _middle(picture, tall, wide)
    height, width = picture.pixels.shape[1:]
    ratio = (min if framing.mode == "pad" else max)(tall / height, wide / width)
    new = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    pixels = F.interpolate(picture.pixels.unsqueeze(0), new, mode="bicubic", antialias=True, align_corners=False).squeeze(0).clamp(-1, 1)
    mask = torch.ones(1, height, width) if picture.mask is None else picture.mask
    mask = F.interpolate(mask.unsqueeze(0), new, mode="area").squeeze(0)
    top, left = (new[0] - tall) // 2, (new[1] - wide) // 2
    pads = (max(0, -left), max(0, wide - new[1] + left), max(0, -top), max(0, tall - new[0] + top))
    pixels, mask = F.pad(pixels, pads), F.pad(mask, pads)
    top, left = max(0, top), max(0, left)
    cut = (slice(None), slice(top, top + tall), slice(left, left + wide))
    return replace(picture, pixels=pixels[cut], mask=mask[cut])

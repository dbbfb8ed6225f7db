"""Pictures as tensors and as files; colours and fonts of all charts."""

from __future__ import annotations

import colorsys
import io
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFont
from torch import Tensor

LARGEST_THUMBNAIL = 2048      # pixels of a side; our own have 256
Colour = tuple[int, int, int]
# Charts and cards are dark, as ComfyUI's nodes are; on a light page they are readable, too. Inks have a
# contrast of at least 4.5 on all papers. EMPTY is the low end of heat maps.
PAPER, CARD_PAPER, ALARM_PAPER = (30, 31, 36), (43, 44, 51), (70, 34, 34)
INK, QUIET, ACCENT, ALARM = (236, 236, 241), (178, 180, 192), (122, 162, 255), (255, 138, 124)
GRID, EMPTY = (62, 63, 72), (52, 53, 61)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Item = TypeVar("Item")


@cache      # a few sizes serve a thousand cards
def font(size: int) -> Font:
    """Pillow's own font; size in pixels."""
    return ImageFont.load_default(size)


def colour(index: int) -> Colour:
    """A colour for a region or concept, different from those of adjacent numbers."""
    # hue steps of the golden ratio
    red, green, blue = colorsys.hsv_to_rgb((index * 0.61803) % 1.0, 0.65, 0.86)
    return int(255 * red), int(255 * green), int(255 * blue)


def between(low: Colour, high: Colour, share: float) -> Colour:
    """The colour of a heat map at a share of 0 to 1."""
    red, green, blue = (int(a + (b - a) * share) for a, b in zip(low, high, strict=True))
    return red, green, blue


def ink_on(shade: Colour) -> Colour:
    """Black or white, whichever has the higher contrast with a colour."""
    black, white = (0, 0, 0), (255, 255, 255)
    return black if contrast(black, shade) > contrast(white, shade) else white


def contrast(one: Colour, other: Colour) -> float:
    """Contrast of two sRGB colours, 1 to 21 (WCAG 2.2, "contrast ratio"); text needs 4.5."""
    def luminance(shade: Colour) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
                  for c in (channel / 255 for channel in shade)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def fitting(text: str, face: Font, width: float) -> str:
    """Truncates a text to `width` pixels on one line. A truncated text ends in "..."."""
    text = " ".join(text.split())[:300]
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..." if text else ""


def _readable(text: str) -> str:
    """A drawable text: on one line, without lone surrogates, which an untrusted bank may contain."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())[:400]


def wrapped(text: str, face: Font, width: float, most: int) -> list[str]:
    """Wraps a text to several lines, at spaces or within too long words. A truncated text ends in "...".

    Args:
        width: Width of a line in pixels.
        most: Maximum number of lines.
    """
    lines: list[str] = []
    rest = _readable(text)
    while rest and len(lines) < most:
        # letters that fit
        end = bisect_right(range(1, len(rest) + 1), width, key=lambda count: face.getlength(rest[:count]))
        if end == len(rest):
            return [*lines, rest]
        if len(lines) == most - 1:
            return [*lines, fitting(rest[: end + 1], face, width)]
        marks = rest.rfind(" ", 0, end + 1), max(rest.rfind(mark, 0, end) + 1 for mark in "-_")
        end = next((mark for mark in marks if mark > end // 2), max(1, end))
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return lines


def to_tensor(image: Image.Image) -> Tensor:
    """A picture as ComfyUI's IMAGE `[1, H, W, 3]` in 0..1."""
    return torch.from_numpy(np.array(image.convert("RGB"))).float().div(255).unsqueeze(0)


def eight_bit(pixels: Tensor) -> Tensor:
    """Pixels in -1..1, of any shape, as uint8 0..255 on the CPU."""
    return ((pixels.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()


def to_pil(picture: Tensor) -> Image.Image:
    """A picture `[3, H, W]` in -1..1 as an 8-bit PIL image."""
    return Image.fromarray(eight_bit(picture).permute(1, 2, 0).contiguous().numpy())


def thumbnail_of(picture: Tensor) -> bytes:
    """A picture `[3, H, W]` in -1..1 as a JPEG of at most 256 pixels a side."""
    image = to_pil(picture)
    image.thumbnail((256, 256))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def opened(thumbnail: bytes) -> Image.Image | None:
    """Opens a thumbnail; None if it is empty, unreadable or large, because banks are untrusted: half a
    megabyte can become gigabytes of pixels."""
    try:
        with warnings.catch_warnings():      # of large pictures, which are not read
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(thumbnail), formats=("JPEG", "PNG")) as picture:
                return picture.convert("RGB") if max(picture.size) <= LARGEST_THUMBNAIL else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def upscale(pictures: Tensor, factor: int) -> Tensor:
    """Enlarges pictures `[B, 3, H, W]` in -1..1 by `factor`."""
    return F.interpolate(pictures, scale_factor=factor, mode="bicubic", antialias=False).clamp(-1, 1)


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, evenly spread from the first to the last."""
    count = min(count, len(items))
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]

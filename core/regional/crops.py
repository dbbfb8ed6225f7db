"""Crops of latents around regions, and the batches in which they are evaluated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

LEAST = 0.5      # a crop's sides are at least this share of the latent's smaller side
MULTIPLE = 8     # and multiples of this many cells


@dataclass(frozen=True)
class Crop:
    """Rows `top` to `bottom` and columns `left` to `right` of a latent; the ends are exclusive."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left

    def cut(self, x: Tensor) -> Tensor:
        """The crop `[..., h', w']` of `[..., h, w]`."""
        return x[..., self.top:self.bottom, self.left:self.right].contiguous()

    def paste(self, part: Tensor, size: tuple[int, int]) -> Tensor:
        """Places a crop `[..., h', w']` into zeros `[..., h, w]`; size: (h, w)."""
        whole = part.new_zeros(*part.shape[:-2], *size)
        whole[..., self.top:self.bottom, self.left:self.right] = part
        return whole


def _span(first: int, last: int, size: int, least: int) -> tuple[int, int]:
    """Widens the span first to last to `least` cells and to a multiple of MULTIPLE, within a side of `size`
    cells.
    """
    length = min(size, -(-max(last - first, least) // MULTIPLE) * MULTIPLE)
    start = min(max(0, (first + last - length + 1) // 2), size - length)
    return start, start + length


def crop_of(mask: Tensor) -> Crop:
    """The smallest allowed crop around a mask `[h, w]`. UNets draw poorly at sizes far below their training
    size.
    """
    height, width = mask.shape
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    if not len(rows):
        return Crop(0, 0, height, width)
    least = round(LEAST * min(height, width))
    top, bottom = _span(int(rows[0]), int(rows[-1]) + 1, height, least)
    left, right = _span(int(columns[0]), int(columns[-1]) + 1, width, least)
    return Crop(top, left, bottom, right)


def crops_of(masks: Tensor, is_cropped: bool) -> list[Crop]:
    """One crop, or the whole frame, for each of the masks `[U, h, w]`."""
    height, width = masks.shape[-2:]
    return [crop_of(mask) if is_cropped else Crop(0, 0, height, width) for mask in masks]


def batches_of(crops: Sequence[Crop], most: int) -> list[list[int]]:
    """Groups crops into batches: numbers of crops with the same size and together at most `most` cells (the
    frame's).
    """
    batches: list[list[int]] = []
    for i, crop in enumerate(crops):
        for batch in batches:
            if crops[batch[0]].size == crop.size and (len(batch) + 1) * math.prod(crop.size) <= most:
                batch.append(i)
                break
        else:
            batches.append([i])
    return batches

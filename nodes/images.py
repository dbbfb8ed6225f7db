"""Converts ComfyUI's IMAGE, MASK and CLIP_VISION to tensors for core."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..core.data.pictures import Deferred
from ..core.errors import ConceptError
from ..core.evaluation.bankcheck import Encode
from ..core.evaluation.metrics import unit
from ..core.evaluation.photo_encoder import photo_encode
from ..core.model.sites import SiteLayout


def _batches(value: Iterable[Tensor | None] | Tensor | None) -> list[Tensor]:
    """Returns one batch, or several, as a list without unconnected inputs."""
    return [value] if isinstance(value, Tensor) else [batch for batch in value or () if batch is not None]


def deferred_pictures(images: Iterable[Tensor | None] | Tensor | None, what: str) -> list[Deferred]:
    """The same as `pictures_of`, but converted each time they are read, because ComfyUI holds large photos as
    float32 already.
    """
    pictures = []
    for batch in _batches(images):
        if batch.ndim != 4 or batch.shape[-1] < 3 or min(batch.shape[:3]) < 1:
            raise ConceptError(f"{what} has a picture of shape {tuple(batch.shape)}; allowed: [count, "
                               "height, width, 3]")
        if not torch.isfinite(batch).all():
            raise ConceptError(f"{what} has a picture with NaN or infinite values")
        height, width = batch.shape[1:3]
        pictures += [Deferred((height, width), partial(_signed, image)) for image in batch[..., :3]]
    return pictures


def _signed(image: Tensor) -> Tensor:
    """`[H, W, 3]` in 0..1 as `[3, H, W]` in -1..1 on the CPU."""
    return image.permute(2, 0, 1).float().cpu() * 2 - 1


def pictures_of(images: Iterable[Tensor | None] | Tensor | None, what: str) -> list[Tensor]:
    """Splits IMAGE batches into single pictures.

    Args:
        images: `[B, H, W, C]` in 0..1, one batch or a list of them; C is 3 or more.
        what: Name of the input, for messages.

    Returns:
        Pictures `[3, H, W]` in -1..1 on the CPU.

    Raises:
        ConceptError: A batch has another shape, NaN or infinity.
    """
    return [picture.read() for picture in deferred_pictures(images, what)]


def masks_of(masks: Iterable[Tensor | None] | Tensor | None, what: str) -> list[Tensor]:
    """Splits MASK batches `[B, H, W]` or `[H, W]` into single masks `[1, H, W]` on the CPU. Raises
    ConceptError for an empty mask.
    """
    singles = [mask.float().cpu().clone().unsqueeze(0) for batch in _batches(masks)
               for mask in batch.reshape(-1, *batch.shape[-2:])]
    for number, mask in enumerate(singles, 1):
        if not torch.isfinite(mask).all() or mask.max() <= 0:
            raise ConceptError(f"number {number} of {what} is empty or has values that are no numbers (NaN); "
                               "white must be somewhere")
    return singles


def to_image(pictures: Tensor) -> Tensor:
    """Pictures `[B, 3, H, W]` in -1..1 as an IMAGE `[B, H, W, 3]` in 0..1."""
    return ((pictures.float().cpu() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)


class ClipVision(Protocol):
    """The parts of a CLIP_VISION that we use. The output's item `image_embeds` is `[B, D]`."""

    def encode_image(self, image: Tensor): ...


def vision(clip_vision: ClipVision) -> Encode:
    """Wraps a CLIP_VISION, with ComfyUI's preprocessing, as a function of pictures.

    Returns:
        A function from pictures `[3, H, W]` in -1..1 of any sizes to unit vectors `[n, D]` on the CPU.
    """

    def encode(pictures: Sequence[Tensor]) -> Tensor:
        vectors = [clip_vision.encode_image(to_image(picture.unsqueeze(0)))["image_embeds"]
                   for picture in pictures]
        if any(not torch.is_tensor(vector) or vector.ndim != 2 for vector in vectors):
            raise ConceptError("the CLIP_VISION gives no vector per picture; load a CLIP vision model such "
                               "as ViT-B/32, ViT-L or ViT-H")
        return unit(torch.cat(vectors).float().cpu())

    return encode


def judge(clip_vision: ClipVision | None, layout: SiteLayout) -> Encode | None:
    """The encoder that compares pictures: a connected CLIP_VISION, else the encoder for photos if it is
    installed.

    layout: that of the base. An embedded base has a CLIP_VISION of its own, so it never gets the encoder for
    photos.
    """
    return photo_encode(layout) if clip_vision is None else vision(clip_vision)

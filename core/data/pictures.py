"""Training pictures: pixels, caption and mask of one photo, and the digest that identifies it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..errors import ConceptError
from ..images import eight_bit


@dataclass(frozen=True)
class Deferred:
    """Pixels of a large picture, which are read each time they are needed.

    size: height and width; read: returns the pixels, of the same kind as `Picture.source`.
    """

    size: tuple[int, int]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Picture:
    """A training photo.

    source: `[3, H, W]`, in -1..1, or 8 bits 0..255 as photos are stored, or deferred; caption: may be empty;
    mask: `[1, H, W]`, weights of the loss, in 0..1, or 8 bits, or deferred, or None; is_prior: whether it is
    a prior-preservation picture; digest: see `photo_digest`; name, caption_name: of the photo and its
    caption, for messages; repeats: how often the photo is drawn, relative to others.
    """

    source: Tensor | Deferred
    caption: str = ""
    mask: Tensor | Deferred | None = None
    is_prior: bool = False
    digest: str = ""
    name: str = ""
    caption_name: str = ""
    repeats: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        source = self.source
        return source.size if isinstance(source, Deferred) else (source.shape[1], source.shape[2])

    def stored_pixels(self) -> Tensor:
        """`[3, H, W]`, in -1..1 or as 8 bits."""
        return self.source.read() if isinstance(self.source, Deferred) else self.source

    def stored_mask(self) -> Tensor | None:
        """`[1, H, W]`, in 0..1 or as 8 bits; None without a mask."""
        return self.mask.read() if isinstance(self.mask, Deferred) else self.mask

    @property
    def pixels(self) -> Tensor:
        """`[3, H, W]` in -1..1."""
        return signed(self.stored_pixels())


def signed(pixels: Tensor) -> Tensor:
    """Pixels in -1..1, from 8 bits where they are stored so."""
    return pixels if pixels.is_floating_point() else pixels.float().div_(127.5).sub_(1.0)


def weights(mask: Tensor) -> Tensor:
    """A mask in 0..1, from 8 bits where it is stored so."""
    return mask if mask.is_floating_point() else mask.float() / 255.0


def photo_digest(pixels: Tensor) -> str:
    """Digest that identifies a photo: 16 hex digits of SHA-256 over its pixels.

    ComfyUI provides pixels but no file, so the digest cannot use the file. It covers the pixels before
    framing: upright, RGB, 8 bits, in the order channel, row, column. File name, metadata and lossless file
    format do not matter. Another size, another decoder of a lossy format, or another background behind
    transparency changes the digest. Banks of early versions store digests of file bytes, which never match
    these.

    Args:
        pixels: `[3, H, W]` in -1..1, or 8 bits.
    """
    digest = hashlib.sha256()
    for channel in pixels:      # one at a time, to save memory
        levels = eight_bit(channel) if channel.is_floating_point() else channel
        digest.update(levels.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def prior_caption(class_noun: str) -> str:
    """The prompt of a prior picture without a caption."""
    return f"a photo of a {class_noun.strip()}" if class_noun.strip() else "a photo"


def captions_for(count: int, texts: Sequence[str]) -> list[str]:
    """Distributes captions over photos.

    Args:
        count: Number of photos.
        texts: One text per photo; or one text with a line per photo, in which an empty line means no caption;
            or one caption for all. If a text ends with a line break after each of `count` lines, these lines
            are the captions even where only the first one is filled.

    Returns:
        One caption per photo, or an empty list if there is none.

    Raises:
        ConceptError: The number of captions fits neither.
    """
    if len(texts) == count > 1:
        captions = [" ".join(text.split()) for text in texts]
        return captions if any(captions) else []
    lines = [line.strip() for text in texts for line in text.splitlines()]
    filled = [line for line in lines if line]
    if not filled:
        return []
    if len(lines) == count and (len(filled) > 1 or sum(text.count("\n") for text in texts) == count):
        return lines
    if len(filled) in (1, count):
        return filled if len(filled) == count else filled * count
    without_end = lines[: max(i for i, line in enumerate(lines) if line) + 1]
    if len(lines) > count >= len(without_end):      # empty lines at the end
        return lines[:count]
    raise ConceptError(f"there are {len(filled)} captions for {count} pictures; give none, one, or one for "
                       "each, a line each, and an empty line for a picture without a caption")


def captions_text(captions: Sequence[str]) -> str:
    """One line per photo, as `captions_for` reads them back; empty if there are no captions."""
    if not any(captions):
        return ""
    # with a gap, a line break after each line tells an empty last line from none
    return "\n".join(captions) if all(captions) else "".join(f"{caption}\n" for caption in captions)


def pair_pictures(pixels: Sequence[Tensor | Deferred], captions: Sequence[str],
                  masks: Sequence[Tensor]) -> list[Picture]:
    """Combines photos with their captions and masks.

    Args:
        pixels: photos `[3, H, W]` in -1..1 of any sizes.
        captions: see `captions_for`.
        masks: none, or one for each photo: `[1, H, W]` in 0..1, of the photo's size.

    Raises:
        ConceptError: Counts or sizes disagree.
    """
    count = len(pixels)
    texts = captions_for(count, captions) or [""] * count
    if len(masks) not in (0, count):
        raise ConceptError(f"there are {len(masks)} masks for {count} pictures; give none or one for each")
    pictures = []
    for i, (photo, text) in enumerate(zip(pixels, texts, strict=True)):
        picture = Picture(photo, text, masks[i] if masks else None, name=f"picture {i + 1}",
                          caption_name=f"caption {i + 1}" if text else "")
        height, width = picture.size
        if masks and masks[i].shape[1:] != (height, width):
            raise ConceptError(f"mask {i + 1} is {masks[i].shape[2]}x{masks[i].shape[1]}, its picture is "
                               f"{width}x{height}; they must have one size")
        pictures.append(replace(picture, digest=photo_digest(picture.stored_pixels())))
    return pictures

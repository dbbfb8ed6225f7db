"""Finds and reads the masks of photos."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import ConceptError
from .captions import Found, PhotoNames, choose
from .reading import TURNS, Shape, eight_bits, has_alpha, opened_picture

# endings of a mask's name, beside its photo or in a folder of masks
ENDINGS = ("-masklabel", "_masklabel", "-mask", "_mask", ".mask")
SURE_ENDINGS = ENDINGS[:2]      # no photo is named so


def owner_name(path: Path) -> str:
    """The name of a mask's photo: `a` for `a-masklabel.png`; empty if the file is not named like a mask."""
    ending = next((ending for ending in ENDINGS if path.stem.lower().endswith(ending)), "")
    return path.stem[: -len(ending)] if ending else ""


def masks_among(files: Sequence[Path]) -> list[Path]:
    """The masks in a folder of photos: files that are named like the mask of another file."""
    names = PhotoNames(files)
    return [file for file in files if owner_name(file)
            and (names.ranked(owner_name(file))
                 or any(file.stem.lower().endswith(ending) for ending in SURE_ENDINGS))]


def find_masks(photos: Sequence[Path], files: Iterable[Path]) -> Found:
    """Assigns masks to photos. A mask has the photo's name, with or without an ending such as `-masklabel`.

    Returns:
        `of`: photo -> mask file.
    """
    files, names = sorted(files), PhotoNames(photos)
    fits = [(photo, rank, file) for file in files for base in (file.stem, owner_name(file)) if base
            for rank, photo in names.ranked(base)]
    return Found(*choose(files, fits, "mask", "a mask, but no photo has this name"))


def _to_grey(image: Image.Image) -> Image.Image:
    """A mask as 8-bit grey. If parts of the picture are transparent, its opacity is the mask."""
    if has_alpha(image):
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            return alpha
        image = image.convert("RGB")
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(eight_bits(image))
    return image.convert("L")


def read_mask(path: Path, photo: Shape) -> tuple[Tensor, str]:
    """Reads the mask of a photo.

    Args:
        photo: The photo's shape. The mask has the photo's upright size, or the size as stored if the photo is
            turned by its EXIF data; then the mask is turned as well. A mask of the same proportions is
            resized.

    Returns:
        The mask `[1, H, W]` of the photo's size, 8 bits or, if it was resized, in 0..1; and what was done to
        fit it, for the report.

    Raises:
        ConceptError: It cannot be read, or has other proportions.
    """
    grey, done = opened_picture(path, "mask", partial(_fitted, photo=photo))
    levels = torch.from_numpy(np.array(grey)).unsqueeze(0)
    if grey.size == photo.size:
        return levels, done
    resized = F.interpolate(levels.unsqueeze(0).float() / 255.0, photo.size[::-1], mode="bilinear")
    return resized.squeeze(0), ", ".join([*([done] if done else []), f"mask resized from {_size(grey.size)}"])


def _fitted(image: Image.Image, photo: Shape) -> tuple[Image.Image, str]:
    """A mask as upright 8-bit grey of the photo's proportions, and what was done to it."""
    grey, done, raw = _to_grey(ImageOps.exif_transpose(image)), "", photo.raw_size
    if grey.size == raw != photo.size or (_is_scaled(grey.size, raw)
                                          and not _is_scaled(grey.size, photo.size)):
        grey, done = grey.transpose(TURNS[photo.orientation]), "mask turned like the photo"
    elif photo.orientation != 1 and photo.size == raw:
        done = "mask taken as upright, because its size fits both ways"
    if not _is_scaled(grey.size, photo.size):
        stored = f" ({_size(raw)} as stored)" if raw != photo.size else ""
        raise ConceptError(f"it is {_size(grey.size)}, its photo is {_size(photo.size)}{stored}; they must "
                           "have the same proportions")
    return grey, done


def _is_scaled(size: tuple[int, int], wanted: tuple[int, int]) -> bool:
    """Whether a size has the wanted proportions, up to rounding to whole pixels."""
    scale = max(size[0] / wanted[0], size[1] / wanted[1])
    return all(abs(side - scale * other) <= min(max(1.0, scale), 0.03 * scale * other)
               for side, other in zip(size, wanted, strict=True))


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"

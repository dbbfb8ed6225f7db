"""Reads photos from folders with captions and masks, and computes digests of photos."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import ConceptError
from ..images import eight_bit
from .framing import Picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# checked by content, not by name; EPS, for example, would start a program
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MOST_PIXELS = 64_000_000
LONGEST_CAPTION = 5000         # characters


def to_pixels(image: Image.Image) -> Tensor:
    """A picture as upright RGB `[3, H, W]` in -1..1.

    Transparent areas become white. 16-bit, floating-point and CMYK pictures are converted. Of an animation,
    the first frame is used.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        array = np.asarray(image, dtype=np.float32)
        image = Image.fromarray((array * (255.0 / _white(image.mode, array))).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def _white(mode: str, array: np.ndarray) -> float:
    """The value of white. It is guessed if PIL's mode does not determine the bit depth."""
    if not np.isfinite(array).all():
        raise ConceptError("it has NaN or infinite values")
    top = array.max()
    if mode == "F" and top <= 1:
        return 1.0
    return 255.0 if top <= 255 and not mode.startswith("I;16") else 65535.0


def read_picture(path: Path, caption: str = "", mask: Path | None = None, is_prior: bool = False) -> Picture:
    """Reads a picture file and its mask file, which may have another size.

    Raises:
        ConceptError: A file cannot be read.
    """
    pixels = _opened(Path(path), "picture", to_pixels)
    white = None if mask is None else _opened(Path(mask), "mask", _to_mask)
    if white is not None and white.shape[1:] != pixels.shape[1:]:
        white = F.interpolate(white.unsqueeze(0), pixels.shape[1:], mode="bilinear").squeeze(0)
    return Picture(pixels, caption, white, is_prior, photo_digest(pixels))


def photo_digest(pixels: Tensor) -> str:
    """Digest that identifies a photo: 16 hex digits of SHA-256 over its pixels.

    ComfyUI provides pixels but no file, so the digest cannot use the file. It covers the pixels before
    framing: upright, RGB, 8 bits, in the order channel, row, column. File name, metadata and lossless file
    format do not matter. Another size, another decoder of a lossy format, or another background behind
    transparency changes the digest. Banks of early versions store digests of file bytes, which never match
    these.

    Args:
        pixels: `[3, H, W]` in -1..1.
    """
    return hashlib.sha256(eight_bit(pixels).contiguous().numpy().tobytes()).hexdigest()[:16]


def pair_pictures(pixels: Sequence[Tensor], captions: Sequence[str],
                  masks: Sequence[Tensor]) -> list[Picture]:
    """Combines photos with their captions and masks.

    Args:
        pixels: photos `[3, H, W]` in -1..1 of any sizes.
        captions: none, one for all photos, or one for each.
        masks: none, or one for each photo: `[1, H, W]` in 0..1, of the photo's size.

    Raises:
        ConceptError: Counts or sizes disagree.
    """
    count = len(pixels)
    if len(captions) not in (0, 1, count):
        raise ConceptError(f"there are {len(captions)} captions for {count} pictures; give none, one, or one "
                           "for each, a line each")
    if len(masks) not in (0, count):
        raise ConceptError(f"there are {len(masks)} masks for {count} pictures; give none or one for each")
    texts = list(captions) if len(captions) == count else [*captions, ""][:1] * count
    pictures = []
    for i, (photo, text) in enumerate(zip(pixels, texts, strict=True)):
        mask = masks[i] if masks else None
        if mask is not None and mask.shape[1:] != photo.shape[1:]:
            raise ConceptError(f"mask {i + 1} is {mask.shape[2]}x{mask.shape[1]}, its picture is "
                               f"{photo.shape[2]}x{photo.shape[1]}; they must have one size")
        pictures.append(Picture(photo, text.strip(), mask, digest=photo_digest(photo)))
    return pictures


def _to_mask(image: Image.Image) -> Tensor:
    """`[1, H, W]` in 0..1."""
    grey = np.array(ImageOps.exif_transpose(image).convert("L"))
    return torch.from_numpy(grey).float().unsqueeze(0) / 255.0


def _opened(path: Path, what: str, convert: Callable[[Image.Image], Tensor]) -> Tensor:
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height <= MOST_PIXELS:
                return convert(image)
            size = f"{image.width}x{image.height} pixels"
    except Image.DecompressionBombError:
        size = "too many pixels"
    except UnidentifiedImageError:
        raise ConceptError(f"the {what} '{path}' is not a readable picture; readable formats are "
                           f"{', '.join(FORMATS)}") from None
    except ConceptError as error:
        raise ConceptError(f"the {what} '{path}' cannot be used: {error}") from None
    except Exception as error:      # PIL's plugins raise arbitrary exceptions for damaged files
        raise ConceptError(f"the {what} '{path}' cannot be read ({type(error).__name__}: {error})") from error
    raise ConceptError(f"the {what} '{path}' has {size}; allowed: up to {MOST_PIXELS // 10**6} million, make "
                       "it smaller")


def _read_caption(stem: str, folder: Path) -> str:
    """The text of `<stem>.txt`; empty if the file is missing."""
    file = folder / f"{stem}.txt"
    if not file.is_file():
        return ""
    with file.open(encoding="utf-8-sig", errors="replace") as text:
        caption = text.read(LONGEST_CAPTION + 1)
    if len(caption) > LONGEST_CAPTION:
        raise ConceptError(f"the caption '{file}' is longer than {LONGEST_CAPTION} characters, the most that "
                           "is allowed")
    return caption.strip()


def file_digests(folder: Path | str) -> list[str]:
    """What identified the photos of a folder in early versions: 16 hex digits of SHA-256 over each file."""
    return [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in _pictures_in(Path(folder))]


def _pictures_in(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith(".")
                  and f.is_file())


def read_folder(folder: Path | str, captions: Path | str | None = None, masks: Path | str | None = None,
                is_prior: bool = False) -> list[Picture]:
    """Reads all pictures of a folder, sorted by name, without hidden files.

    Args:
        captions: folder of `<stem>.txt`; None = beside the pictures. Pictures without a text file have no
            caption.
        masks: folder of pictures `<stem>.*`; None = no masks. Pictures without a mask are used whole.

    Raises:
        ConceptError: A folder is missing, has no pictures, or a file cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConceptError(f"the picture folder '{folder}' does not exist")
    files = _pictures_in(folder)
    if not files:
        raise ConceptError(f"the folder '{folder}' holds no pictures; readable are {', '.join(SUFFIXES)}")
    for extra, what in ((captions, "caption"), (masks, "mask")):
        if extra is not None and not Path(extra).is_dir():
            raise ConceptError(f"the {what} folder '{extra}' does not exist")
    by_stem = {f.stem: f for f in _pictures_in(Path(masks))} if masks is not None else {}
    return [read_picture(f, _read_caption(f.stem, Path(captions or folder)), by_stem.get(f.stem), is_prior)
            for f in files]

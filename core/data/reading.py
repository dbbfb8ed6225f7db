"""Reads picture files: which formats, upright, as 8-bit RGB."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import ConceptError
from .pictures import signed

Item = TypeVar("Item")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# checked by content, not by name; EPS, for example, would start a program
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
# read where Pillow can: suffix -> package that adds it to Pillow
OPTIONAL = {".avif": "pillow-avif-plugin", ".heic": "pillow-heif", ".heif": "pillow-heif",
            ".hif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}
OPTIONAL_FORMATS = ("AVIF", "HEIF", "JXL")
# how these files begin: bytes 8 to 12 after "ftyp", or the first bytes
BRANDS = {**dict.fromkeys((b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1"), ".heic"), b"avif": ".avif"}
JXL_STARTS = (b"\xff\x0a", b"\0\0\0\x0cJXL ")
# pictures in formats that are never read
OTHER_PICTURES = (".svg", ".psd", ".xcf", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2",
                  ".tga", ".ico", ".jp2", ".exr", ".hdr", ".eps", ".pdf", ".mp4", ".mov", ".webm")
MOST_PIXELS = 64_000_000
ROWS = 256      # rows that are converted at once, to save memory
ORIENTATION = 0x0112      # EXIF tag
# EXIF orientation -> what makes the picture upright
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
         7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


@dataclass(frozen=True)
class Shape:
    """size: upright width and height, in Pillow's order; orientation: of the file by EXIF, 1 = stored
    upright."""

    size: tuple[int, int]
    orientation: int

    @property
    def raw_size(self) -> tuple[int, int]:
        """Width and height as stored."""
        return self.size[::-1] if self.orientation >= 5 else self.size


@dataclass(frozen=True)
class Photo:
    """A photo as it was read. levels: `[3, H, W]`, 8 bits, upright; note: what of the file is not in them."""

    levels: Tensor
    shape: Shape
    note: str = ""


def is_picture(name: str) -> bool:
    """Whether a file with this name can be read as a picture."""
    suffix = Path(name).suffix.lower()
    return suffix in SUFFIXES or (suffix in OPTIONAL and _is_registered(suffix))


def is_photo(name: str) -> bool:
    """The same, also if the package that reads it is not installed."""
    return Path(name).suffix.lower() in (*SUFFIXES, *OPTIONAL)


def why_unreadable(name: str) -> str:
    """Why a picture with this name cannot be read; empty if it can, or if it is no picture."""
    suffix = Path(name).suffix.lower()
    if is_picture(name):
        return ""
    if suffix in OPTIONAL:
        return f"{suffix} pictures need the Python package {OPTIONAL[suffix]}; install it, or save the " \
               "picture as PNG or JPEG"
    return f"{suffix} pictures are not read; save it as PNG or JPEG" if suffix in OTHER_PICTURES else ""


def _is_registered(suffix: str) -> bool:
    """Whether Pillow reads files of this suffix, after an installed plugin has registered itself."""
    if suffix not in Image.registered_extensions():
        try:
            _register(OPTIONAL[suffix])
        except (ImportError, OSError):      # not installed, or without its library
            return False
    return Image.registered_extensions().get(suffix) in Image.OPEN


def _register(package: str) -> None:
    """Registers an installed plugin with Pillow. Two of the three do so when they are imported."""
    if package == "pillow-heif":
        import pillow_heif  # type: ignore[import-not-found]

        pillow_heif.register_heif_opener()
    elif package == "pillow-jxl-plugin":
        import pillow_jxl  # type: ignore[import-not-found]  # noqa: F401
    else:
        import pillow_avif  # type: ignore[import-not-found]  # noqa: F401


def has_alpha(image: Image.Image) -> bool:
    """Whether a picture can have transparent areas."""
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def to_levels(image: Image.Image) -> Tensor:
    """A picture as upright RGB `[3, H, W]` with 8 bits.

    Transparent areas become white. 16-bit, floating-point and CMYK pictures are converted. Of an animation,
    the first frame is used.
    """
    ImageOps.exif_transpose(image, in_place=True)      # a copy would take the memory twice
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(eight_bits(image))
    if has_alpha(image):
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    levels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, ROWS):
        rows = image.crop((0, top, image.width, min(top + ROWS, image.height)))
        levels[top : top + ROWS] = np.asarray(rows.convert("RGB"))
    return torch.from_numpy(levels).permute(2, 0, 1)


def to_pixels(image: Image.Image) -> Tensor:
    """A picture as upright RGB `[3, H, W]` in -1..1, see `to_levels`."""
    return signed(to_levels(image))


def eight_bits(image: Image.Image) -> np.ndarray:
    """A grey picture of more than 8 bits, scaled to 8 bits."""
    array = np.asarray(image, dtype=np.float32)
    return (array * (255.0 / _white(image.mode, array))).clip(0, 255).astype(np.uint8)


def _white(mode: str, array: np.ndarray) -> float:
    """The value of white. It is guessed if PIL's mode does not determine the bit depth."""
    if not np.isfinite(array).all():
        raise ConceptError("it has NaN or infinite values")
    top = array.max()
    if mode == "F" and top <= 1:
        return 1.0
    return 255.0 if top <= 255 and not mode.startswith("I;16") else 65535.0


def opened_picture(path: Path, what: str, convert: Callable[[Image.Image], Item]) -> Item:
    """Opens a picture file and returns `convert(image)`.

    Args:
        what: What the file is, for messages.

    Raises:
        ConceptError: The file cannot be read or converted.
    """
    _check_content(path, what)
    formats = (*FORMATS, *(name for name in OPTIONAL_FORMATS if name in Image.OPEN))
    try:
        with Image.open(path, formats=formats) as image:
            if image.width * image.height <= MOST_PIXELS:
                return convert(image)
            size = f"{image.width}x{image.height} pixels"
    except Image.DecompressionBombError:
        size = "too many pixels"
    except UnidentifiedImageError:
        raise ConceptError(f"the {what} '{path}' is not a readable picture; readable formats are "
                           f"{', '.join(formats)}") from None
    except ConceptError as error:
        raise ConceptError(f"the {what} '{path}' cannot be used: {error}") from None
    except Exception as error:      # PIL's plugins raise arbitrary exceptions for damaged files
        raise ConceptError(f"the {what} '{path}' cannot be read ({type(error).__name__}: {error})") from error
    raise ConceptError(f"the {what} '{path}' has {size}; allowed: up to {MOST_PIXELS // 10**6} million, make "
                       "it smaller")


def _check_content(path: Path, what: str) -> None:
    """Raises ConceptError for a picture that needs a package, whatever its name says: phones' HEIC pictures
    are often named `.jpg`."""
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError:      # opening the picture says why
        return
    suffix = BRANDS.get(start[8:12], "") if start[4:8] == b"ftyp" else ""
    suffix = ".jxl" if start.startswith(JXL_STARTS) else suffix
    if suffix and not _is_registered(suffix):
        raise ConceptError(f"the {what} '{path}' cannot be read: {why_unreadable(f'a{suffix}')}")


def _to_photo(image: Image.Image) -> Photo:
    orientation = image.getexif().get(ORIENTATION, 1)
    note = _note(image)
    levels = to_levels(image)
    size = (levels.shape[2], levels.shape[1])
    return Photo(levels, Shape(size, orientation if orientation in TURNS else 1), note)


def _note(image: Image.Image) -> str:
    """What `to_levels` changes: transparency, and all frames of an animation but the first."""
    # a phone's JPEG of several pictures (MPO) counts as one
    is_animated = image.format != "MPO" and getattr(image, "is_animated", False)
    notes = ["the first picture of several"] if is_animated else []
    if has_alpha(image) and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        notes.append("transparent areas are white")
    return ", ".join(notes)


def read_photo(path: Path) -> Photo:
    """Reads a picture file. Raises ConceptError if it cannot be read."""
    return opened_picture(path, "picture", _to_photo)

"""Training pictures: reading a folder, framing, and latents that are encoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import ConceptError
from ..hosts.backbone import Backbone
from ..methods.base import Batch
from ..prompts import caption_with_placeholder

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


@dataclass(frozen=True)
class Picture:
    """pixels `[3, H, W]` in -1..1; caption may be empty; mask `[1, H, W]` in 0..1 or None; is_prior: a prior-preservation picture."""

    pixels: Tensor
    caption: str = ""
    mask: Tensor | None = None
    is_prior: bool = False
    digest: str = ""


def to_pixels(image: Image.Image) -> Tensor:
    """Upright RGB in -1..1, transparency on white; 16-bit and CMYK pictures included."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        array = np.asarray(image, dtype=np.float32)      # 8 or 16 bits per value; PIL does not say which
        image = Image.fromarray((array * (255.0 / (255.0 if array.max() <= 255 else 65535.0))).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1.0


def read_picture(path: Path, caption: str = "", mask: Path | None = None, is_prior: bool = False) -> Picture:
    """Raises ConceptError when a file is not a picture that can be read."""
    path = Path(path)
    pixels = _opened(path, "picture", to_pixels)
    matte = None if mask is None else _opened(Path(mask), "mask", _to_mask)
    if matte is not None and matte.shape[1:] != pixels.shape[1:]:
        matte = F.interpolate(matte.unsqueeze(0), pixels.shape[1:], mode="bilinear").squeeze(0)
    return Picture(pixels, caption, matte, is_prior, hashlib.sha256(path.read_bytes()).hexdigest()[:16])


def _to_mask(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("L"))).float().unsqueeze(0) / 255.0


def _opened(path: Path, what: str, convert: Callable[[Image.Image], Tensor]) -> Tensor:
    try:
        with Image.open(path) as image:
            return convert(image)
    except Exception as error:      # PIL's plugins raise nearly anything over a damaged file
        raise ConceptError(f"the {what} '{path}' cannot be read ({type(error).__name__}: {error})") from error


def _read_caption(stem: str, folder: Path) -> str:
    file = folder / f"{stem}.txt"
    return file.read_text(encoding="utf-8-sig", errors="replace").strip() if file.is_file() else ""


def _pictures_in(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith(".") and f.is_file())


def read_folder(folder: Path | str, captions: Path | str | None = None, masks: Path | str | None = None,
                is_prior: bool = False) -> list[Picture]:
    """Every picture of a folder in name order, hidden files left out.

    Captions: `<stem>.txt` beside the pictures or in `captions`; masks: the picture `<stem>.*` in `masks`, where there is one.
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
    return [read_picture(f, _read_caption(f.stem, Path(captions or folder)), by_stem.get(f.stem), is_prior) for f in files]


@dataclass(frozen=True)
class Framing:
    """How pictures become squares of `resolution` pixels.

    "crop" fills the square; "pad" shows the whole picture on grey and masks the rest.
    """

    resolution: int
    mode: str = "crop"
    flip: bool = True

    def __post_init__(self) -> None:
        if self.mode not in ("crop", "pad"):
            raise ConceptError(f"framing is {self.mode!r}; allowed: crop, pad")


def frame(picture: Picture, framing: Framing) -> Picture:
    """The picture as a square, with a mask that says which part counts."""
    size = framing.resolution
    height, width = picture.pixels.shape[1:]
    ratio = size / (min(height, width) if framing.mode == "crop" else max(height, width))
    new = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    pixels = F.interpolate(picture.pixels.unsqueeze(0), new, mode="bicubic", antialias=True, align_corners=False).squeeze(0).clamp(-1, 1)
    mask = torch.ones(1, height, width) if picture.mask is None else picture.mask
    mask = F.interpolate(mask.unsqueeze(0), new, mode="area").squeeze(0)
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    pads = (max(0, -left), max(0, size - new[1] + left), max(0, -top), max(0, size - new[0] + top))
    pixels, mask = F.pad(pixels, pads), F.pad(mask, pads)
    top, left = max(0, top), max(0, left)
    cut = (slice(None), slice(top, top + size), slice(left, left + size))
    return replace(picture, pixels=pixels[cut], mask=mask[cut])


@dataclass(frozen=True)
class TrainingSet:
    """Cached latents `[n, C, h, w]`, masks `[n, 1, h, w]`, captions with placeholders, and which rows are prior pictures."""

    latents: Tensor
    masks: Tensor
    captions: tuple[str, ...]
    is_prior: Tensor
    digests: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.captions)

    def draw(self, size: int, prior_weight: float, generator: torch.Generator) -> Batch:
        """A batch: own pictures, and as many prior pictures again where there are any."""
        own, prior = (~self.is_prior).nonzero().squeeze(1), self.is_prior.nonzero().squeeze(1)
        index = own[_spread(len(own), size, generator)]
        if len(prior) and prior_weight > 0:
            index = torch.cat([index, prior[_spread(len(prior), size, generator)]])
        flags = self.is_prior[index]
        weights = torch.where(flags, prior_weight, 1.0)
        return Batch(self.latents[index], tuple(self.captions[i] for i in index.tolist()), self.masks[index], flags, weights)


def _spread(count: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` indices below `count`, each picture as often as the others."""
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-size // count))]
    return torch.cat(rounds)[:size]


@torch.inference_mode(False)
@torch.no_grad()
def prepare(backbone: Backbone, pictures: Sequence[Picture], name: str, class_noun: str, framing: Framing) -> TrainingSet:
    """Frames and encodes every picture once (and once mirrored with `flip`). Prior pictures keep their caption as it is."""
    own = [p for p in pictures if not p.is_prior]
    if not own:
        raise ConceptError("there are no pictures of the concept; at least one is needed")
    if framing.resolution % backbone.picture_multiple or framing.resolution < 2 * backbone.picture_multiple:
        raise ConceptError(f"resolution is {framing.resolution}; it must be a multiple of {backbone.picture_multiple}, "
                           f"at least {2 * backbone.picture_multiple}")
    pixels, masks, captions, priors = [], [], [], []
    for picture in pictures:
        framed = frame(picture, framing)
        caption = picture.caption if picture.is_prior else caption_with_placeholder(picture.caption, name, class_noun)
        for mirrored in (False, True) if framing.flip else (False,):
            pixels.append(framed.pixels.flip(-1) if mirrored else framed.pixels)
            masks.append(framed.mask.flip(-1) if mirrored else framed.mask)
            captions.append(caption)
            priors.append(picture.is_prior)
    latents = torch.cat([backbone.encode_images(chunk) for chunk in torch.stack(pixels).split(8)])
    small = F.interpolate(torch.stack(masks), latents.shape[-2:], mode="area")
    digests = tuple(p.digest for p in own)
    return TrainingSet(latents, small.to(latents.device), tuple(captions), torch.tensor(priors), digests)

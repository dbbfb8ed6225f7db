"""Training pictures: reading a folder, framing, and latents that are encoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..bank.prompts import caption_with_placeholder
from ..errors import ConceptError
from ..images import eight_bit
from ..model.backbone import Backbone
from .batch import Batch
from .framing import Framing, Picture, bucket_of, frame

UNET_MULTIPLE = 8      # sides of latents in buckets: three halvings, as in every family here
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")      # whatever a file is named; EPS for one would start a program
MOST_PIXELS = 64_000_000
LEAST_SHARE = 16               # a picture's shorter side is at least the resolution's so manieth part: of less there is nothing to learn
LONGEST_CAPTION = 5000         # characters


def to_pixels(image: Image.Image) -> Tensor:
    """Upright RGB in -1..1, transparency on white; 16-bit, floating-point and CMYK pictures included; of an animation its first frame."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        array = np.asarray(image, dtype=np.float32)
        image = Image.fromarray((array * (255.0 / _white(image.mode, array))).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def _white(mode: str, array: np.ndarray) -> float:
    """The number that means white. PIL's modes do not always say how many bits there were."""
    if not np.isfinite(array).all():
        raise ConceptError("it has values that are no numbers (NaN or infinity)")
    top = array.max()
    if mode == "F" and top <= 1:
        return 1.0
    return 255.0 if top <= 255 and not mode.startswith("I;16") else 65535.0


def read_picture(path: Path, caption: str = "", mask: Path | None = None, is_prior: bool = False) -> Picture:
    """Raises ConceptError when a file is not a picture that can be read."""
    path = Path(path)
    pixels = _opened(path, "picture", to_pixels)
    matte = None if mask is None else _opened(Path(mask), "mask", _to_mask)
    if matte is not None and matte.shape[1:] != pixels.shape[1:]:
        matte = F.interpolate(matte.unsqueeze(0), pixels.shape[1:], mode="bilinear").squeeze(0)
    return Picture(pixels, caption, matte, is_prior, photo_digest(pixels))


def photo_digest(pixels: Tensor) -> str:
    """The identity of a photo, whoever opened it: 16 hex digits of SHA-256 over its pixels.

    Pixels and not the file, because ComfyUI hands over pixels alone. They are those before framing: upright, RGB, 8 bits, in the order
    channel, row, column. Names, metadata and lossless formats change nothing; another decoder of a lossy format, another size or
    transparency laid on another ground give another digest. Banks of early versions hold digests of file bytes, which match none of these.

    Args:
        pixels: `[3, H, W]` in -1..1.
    """
    return hashlib.sha256(eight_bit(pixels).contiguous().numpy().tobytes()).hexdigest()[:16]


def pair_pictures(pixels: Sequence[Tensor], captions: Sequence[str], masks: Sequence[Tensor]) -> list[Picture]:
    """Photos with their captions and masks.

    Args:
        pixels: photos `[3, H, W]` in -1..1 of any sizes.
        captions: none, one for all photos, or one for each.
        masks: none, or one for each photo: `[1, H, W]` in 0..1, of the photo's size.

    Raises:
        ConceptError: when counts or sizes disagree.
    """
    count = len(pixels)
    if len(captions) not in (0, 1, count):
        raise ConceptError(f"there are {len(captions)} captions for {count} pictures; give none, one, or one for each, a line each")
    if len(masks) not in (0, count):
        raise ConceptError(f"there are {len(masks)} masks for {count} pictures; give none or one for each")
    texts = list(captions) if len(captions) == count else [*captions, ""][:1] * count
    pictures = []
    for i, (photo, text) in enumerate(zip(pixels, texts, strict=True)):
        mask = masks[i] if masks else None
        if mask is not None and mask.shape[1:] != photo.shape[1:]:
            raise ConceptError(f"mask {i + 1} is {mask.shape[2]}x{mask.shape[1]}, its picture is {photo.shape[2]}x{photo.shape[1]}; "
                               "they must have one size")
        pictures.append(Picture(photo, text.strip(), mask, digest=photo_digest(photo)))
    return pictures


def _to_mask(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("L"))).float().unsqueeze(0) / 255.0


def _opened(path: Path, what: str, convert: Callable[[Image.Image], Tensor]) -> Tensor:
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height <= MOST_PIXELS:
                return convert(image)
            size = f"{image.width}x{image.height} pixels"
    except Image.DecompressionBombError:
        size = "too many pixels"
    except UnidentifiedImageError:
        raise ConceptError(f"the {what} '{path}' is no picture that can be read, whatever its name; readable are "
                           + ", ".join(FORMATS)) from None
    except ConceptError as error:
        raise ConceptError(f"the {what} '{path}' cannot be used: {error}") from None
    except Exception as error:      # PIL's plugins raise nearly anything over a damaged file
        raise ConceptError(f"the {what} '{path}' cannot be read ({type(error).__name__}: {error})") from error
    raise ConceptError(f"the {what} '{path}' has {size}; allowed: up to {MOST_PIXELS // 10**6} million, make it smaller")


def _read_caption(stem: str, folder: Path) -> str:
    file = folder / f"{stem}.txt"
    if not file.is_file():
        return ""
    with file.open(encoding="utf-8-sig", errors="replace") as text:
        caption = text.read(LONGEST_CAPTION + 1)
    if len(caption) > LONGEST_CAPTION:
        raise ConceptError(f"the caption '{file}' is longer than {LONGEST_CAPTION} characters, the most that is allowed")
    return caption.strip()


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


@dataclass(frozen=True)
class BucketSet:
    """Pictures of several shapes: a training set for each. A batch is of one shape, which comes up as often as it has own pictures."""

    parts: tuple[TrainingSet, ...]
    digests: tuple[str, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(caption for part in self.parts for caption in part.captions)

    @property
    def is_prior(self) -> Tensor:
        return torch.cat([part.is_prior for part in self.parts])

    @property
    def latents(self) -> Tensor:
        """There is no one tensor of them: for who needs one, a sentence."""
        raise ConceptError("this method needs all pictures in one shape, they have several; choose framing crop or pad")

    def draw(self, size: int, prior_weight: float, generator: torch.Generator) -> Batch:
        own = torch.tensor([float((~part.is_prior).sum()) for part in self.parts])
        return self.parts[int(torch.multinomial(own, 1, generator=generator))].draw(size, prior_weight, generator)


@torch.inference_mode(False)
@torch.no_grad()
def prepare(backbone: Backbone, pictures: Sequence[Picture], name: str, class_noun: str, framing: Framing) -> TrainingSet | BucketSet:
    """Frames and encodes every picture once (and once mirrored with `flip`). Prior pictures keep their caption as it is; with buckets each
    shape has all of them."""
    own = [p for p in pictures if not p.is_prior]
    if not own:
        raise ConceptError("there are no pictures of the concept; at least one is needed")
    step = backbone.picture_multiple * (UNET_MULTIPLE if framing.mode == "buckets" else 1)
    least = step if framing.mode == "buckets" else 2 * step
    if framing.resolution % step or framing.resolution < least:
        raise ConceptError(f"resolution is {framing.resolution}; with framing {framing.mode} it must be a multiple of {step}, "
                           f"at least {least}")
    _check(pictures, framing)
    digests = tuple(p.digest for p in own)
    if framing.mode != "buckets":
        return _encoded(backbone, pictures, name, class_noun, framing, (framing.resolution, framing.resolution), digests)
    shapes: dict[tuple[int, int], list[Picture]] = {}
    for picture in own:
        shapes.setdefault(bucket_of(*picture.pixels.shape[1:], framing.resolution, step), []).append(picture)
    prior = [p for p in pictures if p.is_prior]
    parts = [_encoded(backbone, [*some, *prior], name, class_noun, framing, size, ()) for size, some in shapes.items()]
    return replace(parts[0], digests=digests) if len(parts) == 1 else BucketSet(tuple(parts), digests)


def _check(pictures: Sequence[Picture], framing: Framing) -> None:
    """Raises ConceptError for what there is nothing to learn from."""
    least = -(-framing.resolution // LEAST_SHARE)
    for what, picture in _numbered(pictures):
        height, width = picture.pixels.shape[1:]
        if min(height, width) < least:
            raise ConceptError(f"{what} is {width}x{height} pixels; with resolution {framing.resolution} both sides must be at least "
                               f"{least}")
        if not torch.isfinite(picture.pixels).all():
            raise ConceptError(f"{what} has values that are no numbers (NaN or infinity)")
        if len(picture.caption) > LONGEST_CAPTION:
            raise ConceptError(f"the caption of {what} has {len(picture.caption)} characters; allowed: up to {LONGEST_CAPTION}")
        if picture.mask is not None and not _seen(picture.mask, framing).max() > 0:
            raise ConceptError(f"the mask of {what} leaves nothing of it with framing {framing.mode}; white must be somewhere in the part "
                               "that is learned")


def _seen(mask: Tensor, framing: Framing) -> Tensor:
    """The part of a mask that framing leaves, enlarged or not."""
    return frame(Picture(mask), framing).pixels if framing.mode == "crop" else mask


def _numbered(pictures: Sequence[Picture]) -> list[tuple[str, Picture]]:
    """Pictures with what a person can find them by."""
    counts, found = {False: 0, True: 0}, []
    for picture in pictures:
        counts[picture.is_prior] += 1
        found.append((f"{'prior ' * picture.is_prior}picture {counts[picture.is_prior]}", picture))
    return found


def _encoded(backbone: Backbone, pictures: Sequence[Picture], name: str, class_noun: str, framing: Framing, size: tuple[int, int],
             digests: tuple[str, ...]) -> TrainingSet:
    pixels, masks, captions, priors = [], [], [], []
    for picture in pictures:
        framed = frame(picture, framing, size)
        caption = picture.caption if picture.is_prior else caption_with_placeholder(picture.caption, name, class_noun)
        for mirrored in (False, True) if framing.flip else (False,):
            pixels.append(framed.pixels.flip(-1) if mirrored else framed.pixels)
            masks.append(framed.mask.flip(-1) if mirrored else framed.mask)
            captions.append(caption)
            priors.append(picture.is_prior)
    latents = torch.cat([backbone.encode_images(chunk) for chunk in torch.stack(pixels).split(8)])
    if not torch.isfinite(latents).all():
        raise ConceptError("the autoencoder makes values that are no numbers (NaN or infinity) of the pictures; run it in float32 "
                           "(ComfyUI: --fp32-vae) or load another VAE")
    small = F.interpolate(torch.stack(masks), latents.shape[-2:], mode="area")
    return TrainingSet(latents, small.to(latents.device), tuple(captions), torch.tensor(priors), digests)

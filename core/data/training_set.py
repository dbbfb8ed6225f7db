"""Frames and encodes photos once, and draws batches from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bank.concepts import ConceptInfo
from ..bank.grammar import PLACEHOLDER
from ..bank.hints import notes_on_caption
from ..bank.prompts import Vocabulary, caption_with_placeholder
from ..errors import ConceptError
from ..model.backbone import Backbone
from .batch import Batch
from .caption_lint import caption_warnings
from .captions import LONGEST_CAPTION
from .framing import Framing, bucket_of, frame
from .pictures import Picture, weights
from .report import PhotoWarning

UNET_MULTIPLE = 8      # factor of bucket latents' sides: UNets halve them three times
SMALLEST_SHARE = 16      # minimum shorter side of a picture = resolution / this
ENCODED_AT_ONCE = 8      # pictures


class TrainingData(Protocol):
    """Training data of a task: a `TrainingSet`, or a `BucketSet` for several shapes."""

    def __len__(self) -> int: ...

    @property
    def captions(self) -> tuple[str, ...]: ...

    @property
    def is_prior(self) -> Tensor: ...

    @property
    def latents(self) -> Tensor: ...

    @property
    def digests(self) -> tuple[str, ...]: ...

    @property
    def repeats(self) -> tuple[int, ...]: ...

    def draw(self, size: int, prior_weight: float, generator: torch.Generator) -> Batch: ...


@dataclass(frozen=True)
class TrainingSet:
    """Encoded photos of one shape.

    latents: `[n, C, h, w]`; masks: `[n, 1, h, w]`; captions: n texts with placeholders; is_prior: `[n]` bool,
    True for prior-preservation pictures; digests: digests of the concept's photos; repeats: how often each
    one is drawn, relative to the others, empty = equally often.
    """

    latents: Tensor
    masks: Tensor
    captions: tuple[str, ...]
    is_prior: Tensor
    digests: tuple[str, ...]
    repeats: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.captions)

    def _drawable(self, is_prior: bool) -> Tensor:
        """Indices of the photos or of the prior pictures, each as often as it is repeated."""
        index = (self.is_prior if is_prior else ~self.is_prior).nonzero().squeeze(1)
        return index.repeat_interleave(torch.tensor(self.repeats)[index]) if self.repeats else index

    @property
    def photo_count(self) -> int:
        """Number of photos with their repeats."""
        return len(self._drawable(False))

    def draw(self, size: int, prior_weight: float, generator: torch.Generator) -> Batch:
        """Draws `size` photos of the concept, and the same number of prior pictures if there are any."""
        photos, prior = self._drawable(False), self._drawable(True)
        index = photos[_evenly(len(photos), size, generator)]
        if len(prior) and prior_weight > 0:
            index = torch.cat([index, prior[_evenly(len(prior), size, generator)]])
        flags = self.is_prior[index]
        weights = torch.where(flags, prior_weight, 1.0)
        captions = tuple(self.captions[i] for i in index.tolist())
        return Batch(self.latents[index], captions, self.masks[index], flags, weights)


def _evenly(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Draws `size` random indices below `count`. The counts of all indices differ by at most one."""
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-size // count))]
    return torch.cat(rounds)[:size]


@dataclass(frozen=True)
class BucketSet:
    """Encoded photos of several shapes, with one training set per shape. A batch has a single shape, drawn in
    proportion to its number of photos.
    """

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
    def repeats(self) -> tuple[int, ...]:
        return tuple(count for part in self.parts for count in part.repeats)

    @property
    def latents(self) -> Tensor:
        """Raises an error for methods that need a single tensor of latents, because shapes differ."""
        raise ConceptError("this method needs all pictures in one shape, they have several; choose framing "
                           "crop or pad")

    def draw(self, size: int, prior_weight: float, generator: torch.Generator) -> Batch:
        photos = torch.tensor([float(part.photo_count) for part in self.parts])
        index = int(torch.multinomial(photos, 1, generator=generator))
        return self.parts[index].draw(size, prior_weight, generator)


@torch.inference_mode(False)
@torch.no_grad()
def prepare(backbone: Backbone, pictures: Sequence[Picture], name: str, class_noun: str,
            framing: Framing) -> TrainingData:
    """Frames and encodes every picture once, and once mirrored if `framing.flip` is on.

    Captions of prior pictures are not changed. With buckets, every shape gets all prior pictures.

    Args:
        name, class_noun: Name and class noun of the concept, used to put its placeholder into captions.

    Raises:
        ConceptError: There is no photo, the resolution does not fit the model, or a picture is unusable.
    """
    photos = [picture for picture in pictures if not picture.is_prior]
    if not photos:
        raise ConceptError("there are no pictures of the concept; at least one is needed")
    step = backbone.picture_multiple * (UNET_MULTIPLE if framing.mode == "buckets" else 1)
    least = step if framing.mode == "buckets" else 2 * step
    if framing.resolution % step or framing.resolution < least:
        raise ConceptError(f"resolution is {framing.resolution}; with framing {framing.mode} it must be a "
                           f"multiple of {step}, at least {least}")
    _check(pictures, framing)
    pictures = _with_fewest_repeats(pictures)
    photos = [picture for picture in pictures if not picture.is_prior]
    digests = tuple(photo.digest for photo in photos)
    if framing.mode != "buckets":
        square = (framing.resolution, framing.resolution)
        return _encoded(backbone, pictures, name, class_noun, framing, square, digests)
    buckets: dict[tuple[int, int], list[Picture]] = {}
    for photo in photos:
        height, width = photo.size
        buckets.setdefault(bucket_of(height, width, framing.resolution, step), []).append(photo)
    prior = [picture for picture in pictures if picture.is_prior]
    parts = [_encoded(backbone, [*members, *prior], name, class_noun, framing, size, ())
             for size, members in buckets.items()]
    return replace(parts[0], digests=digests) if len(parts) == 1 else BucketSet(tuple(parts), digests)


def check_captions(pictures: Sequence[Picture], infos: Iterable[ConceptInfo],
                   concept: ConceptInfo | None = None) -> list[PhotoWarning]:
    """Warnings about captions that name a concept in a way that is text there, such as `<rex:0.8>`.

    Args:
        infos: The concepts that captions may name.
        concept: What is learned from the pictures, for `caption_warnings`; None = prior pictures.

    Raises:
        ConceptError: A caption names a concept that is not among these.
    """
    vocabulary, warnings = Vocabulary(infos), []
    for i, picture in enumerate(pictures):
        what = picture.caption_name or "a caption"
        if concept is not None:
            _refuse_another_name(vocabulary, picture.caption, what, concept)
        vocabulary.parse_caption(picture.caption, what)
        warnings += [PhotoWarning("caption", note, (i,))
                     for note in notes_on_caption(vocabulary, picture.caption, what)]
    return warnings + ([] if concept is None else caption_warnings(pictures, concept))


def _refuse_another_name(vocabulary: Vocabulary, caption: str, what: str, concept: ConceptInfo) -> None:
    """Raises ConceptError if a caption lacks the concept's name and has an unknown one that is no misspelling
    of a known one."""
    names = PLACEHOLDER.findall(caption)
    for name in names:
        if concept.name not in names and name not in vocabulary.entries and not vocabulary.near(name):
            raise ConceptError(f"{what} names <{name}>, and the concept to learn is called "
                               f"{concept.placeholder}; if both are the same, name the concept {name}, or "
                               f"write {concept.placeholder} into the captions; if not, give the bank that "
                               f"holds <{name}>")


def _with_fewest_repeats(pictures: Sequence[Picture]) -> list[Picture]:
    """The pictures with repeats divided by their greatest common divisor, for photos and prior pictures
    apart."""
    divisors = {is_prior: math.gcd(*(picture.repeats for picture in pictures if picture.is_prior == is_prior))
                for is_prior in (False, True)}
    return [replace(picture, repeats=picture.repeats // divisors[picture.is_prior]) for picture in pictures]


def _check(pictures: Sequence[Picture], framing: Framing) -> None:
    """Raises ConceptError for unusable pictures."""
    least = -(-framing.resolution // SMALLEST_SHARE)
    counts = {False: 0, True: 0}
    for picture in pictures:
        counts[picture.is_prior] += 1
        what = picture.name or f"{'prior ' * picture.is_prior}picture {counts[picture.is_prior]}"
        height, width = picture.size
        if min(height, width) < least:
            raise ConceptError(f"{what} is {width}x{height} pixels; with resolution {framing.resolution} "
                               f"both sides must be at least {least}")
        if isinstance(picture.source, Tensor) and not torch.isfinite(picture.source).all():
            raise ConceptError(f"{what} has NaN or infinite values")
        if len(picture.caption) > LONGEST_CAPTION:
            raise ConceptError(f"the caption of {what} has {len(picture.caption)} characters; allowed: up to "
                               f"{LONGEST_CAPTION}")
        mask = picture.stored_mask()
        if mask is not None and not _visible(weights(mask), framing).max() > 0:
            raise ConceptError(f"the mask of {what} leaves nothing of it with framing {framing.mode}; white "
                               "must be somewhere in the part that is learned")


def _visible(mask: Tensor, framing: Framing) -> Tensor:
    """The visible part of a mask after framing; its size may change."""
    return frame(Picture(mask), framing).pixels if framing.mode == "crop" else mask


def _encoded(backbone: Backbone, pictures: Sequence[Picture], name: str, class_noun: str, framing: Framing,
             size: tuple[int, int], digests: tuple[str, ...]) -> TrainingSet:
    pixels, masks, captions, priors, repeats = [], [], [], [], []
    for picture in pictures:
        framed = frame(picture, framing, size)
        mask = framed.stored_mask()
        assert mask is not None      # `frame` always returns a mask
        caption = picture.caption
        if not picture.is_prior:
            caption = caption_with_placeholder(caption, name, class_noun)
        for mirrored in (False, True) if framing.flip else (False,):
            pixels.append(framed.pixels.flip(-1) if mirrored else framed.pixels)
            masks.append(mask.flip(-1) if mirrored else mask)
            captions.append(caption)
            priors.append(picture.is_prior)
            repeats.append(picture.repeats)
    latents = torch.cat([backbone.encode_images(chunk)
                         for chunk in torch.stack(pixels).split(ENCODED_AT_ONCE)])
    if not torch.isfinite(latents).all():
        raise ConceptError("the autoencoder returns NaN or infinite values for the pictures; "
                           "run it in float32 (ComfyUI: --fp32-vae) or load another VAE")
    small = F.interpolate(torch.stack(masks), latents.shape[-2:], mode="area")
    return TrainingSet(latents, small.to(latents.device), tuple(captions), torch.tensor(priors), digests,
                       tuple(repeats) if any(count != 1 for count in repeats) else ())

"""The report on the photos of a concept: what was taken, what was skipped and why, and what may go wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch import Tensor

from ..bank.composition import WORDS, Composition
from ..bank.concepts import ConceptInfo
from .pictures import Picture
from .quality import BLURRED, PHOTO_ROUGHNESS, THUMBNAIL, Quality, alike, measure

FEWEST = 3      # photos of a concept
ENLARGED = 1.25      # photos that must be enlarged by more than this factor are too small
LISTED = 40      # photos that are listed one by one as text
FOUND = "found"      # where a mask comes from that `saliency.subject_mask` made
NAMED = 6      # names in a sentence


@dataclass(frozen=True)
class PhotoFacts:
    """What is known about one photo.

    name: file name, or "picture 3"; width, height: in pixels, upright; caption: text, may be empty;
    caption_from, mask_from: file names, "input" where they did not come from a file, `FOUND` for a mask that
    was made, empty = none; repeats: how often it is drawn, relative to others; note: what was done to fit its
    mask; mask: a small copy of it.
    """

    name: str
    width: int
    height: int
    digest: str
    quality: Quality
    caption: str = ""
    caption_from: str = ""
    mask_from: str = ""
    repeats: int = 1
    note: str = ""
    mask: Image.Image | None = None

    def to_json(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "file": self.name, "width": self.width, "height": self.height, "caption": self.caption,
            "caption_from": self.caption_from or None, "mask_from": self.mask_from or None}
        return facts | ({"repeats": self.repeats} if self.repeats != 1 else {}) | (
            {"note": self.note} if self.note else {})

    def line(self) -> str:
        parts = [f"{self.width}x{self.height}",
                 f"caption {_source(self.caption_from)}" if self.caption_from else "no caption"]
        parts += [f"mask {_source(self.mask_from)}"] if self.mask_from else []
        parts += [f"{self.repeats} repeats"] if self.repeats != 1 else []
        return f"{self.name}: {', '.join([*parts, *([self.note] if self.note else [])])}"


def _source(file: str) -> str:
    return {"input": "given", FOUND: "found in the photo"}.get(file, f"from {file}")


@dataclass(frozen=True)
class Skipped:
    """A file, or a part of it, that was not used."""

    name: str
    reason: str


@dataclass(frozen=True)
class PhotoWarning:
    """Something that may spoil what is learned.

    kind: "few", "duplicate", "alike", "small", "blurred", "flat", "bank", "photos", "caption", "mask" or
    "prior"; text: a sentence; photos: indices of the photos that it is about.
    """

    kind: str
    text: str
    photos: tuple[int, ...] = ()


@dataclass(frozen=True)
class Report:
    """What was taken, what was skipped, and warnings."""

    photos: tuple[PhotoFacts, ...]
    skipped: tuple[Skipped, ...] = ()
    warnings: tuple[PhotoWarning, ...] = ()
    what: str = "photo"      # or "prior picture"

    def checked(self, resolution: int | None = None, enlarges: bool = True,
                infos: Mapping[str, ConceptInfo] | None = None, but: str = "",
                drawing_base: str = "") -> Report:
        """This report with warnings about its photos.

        Args:
            resolution: Side of the training pictures; None = not known, so that sizes are not checked.
            enlarges: Whether small photos are enlarged to the resolution.
            infos: The concepts of the bank.
            but: A concept that is not compared, because it is learned again.
            drawing_base: What the user calls the base if it knows only drawings; empty = any other base.
        """
        found = [*_few(self), *_duplicates(self.photos),
                 *_small(self.photos, resolution if enlarges else None),
                 *_blurred(self.photos), *_known(self.photos, infos or {}, but),
                 *no_drawings(self, drawing_base)]
        return replace(self, warnings=(*self.warnings, *found))

    @property
    def headline(self) -> str:
        """`5 photos, 4 with captions, 2 with masks; 1 file skipped`"""
        captions = sum(bool(photo.caption) for photo in self.photos)
        masks = sum(bool(photo.mask_from) for photo in self.photos)
        text = f"{counted(len(self.photos), self.what)}, {captions or 'none'} with captions"
        text += f", {masks} with masks" if masks else ""
        return text + (f"; {counted(len(self.skipped), 'file')} skipped" if self.skipped else "")

    def reasons(self) -> dict[str, list[str]]:
        """Reason -> the files that were not used because of it."""
        reasons: dict[str, list[str]] = {}
        for skipped in self.skipped:
            reasons.setdefault(skipped.reason, []).append(skipped.name)
        return reasons

    def lines(self, with_photos: bool = True) -> list[str]:
        """The report as lines of text: counts, photos, skipped files by reason, warnings."""
        rows = [self.headline]
        if with_photos:
            rows += [f"  {photo.line()}" for photo in self.photos[:LISTED]]
            rows += [f"  and {len(self.photos) - LISTED} more"] if len(self.photos) > LISTED else []
        rows += [f"  not used: {', '.join(names)}: {reason}" for reason, names in self.reasons().items()]
        return [*rows, *(f"  warning: {warning.text}" for warning in self.warnings)]

    def to_json(self) -> dict[str, Any]:
        return {"taken": [photo.to_json() for photo in self.photos],
                "skipped": [{"file": skipped.name, "reason": skipped.reason} for skipped in self.skipped],
                "warnings": [{"kind": warning.kind, "text": warning.text,
                              "files": [self.photos[i].name for i in warning.photos]}
                             for warning in self.warnings]}


def small_mask(mask: Tensor | None) -> Image.Image | None:
    """A copy of a mask `[1, H, W]` for contact sheets."""
    if mask is None:
        return None
    levels = (mask[0] * 255).round().clamp(0, 255).byte() if mask.is_floating_point() else mask[0]
    image = Image.fromarray(levels.cpu().numpy())
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return image


def _hides_something(mask: Tensor | None) -> bool:
    """False for a mask that is white everywhere, which nodes give where a photo has none."""
    return mask is not None and bool((mask < (1 if mask.is_floating_point() else 255)).any())


def report_of(pictures: Sequence[Picture], resolution: int | None = None, what: str = "photo") -> Report:
    """The report on photos that did not come from files."""
    facts = []
    for picture in pictures:
        height, width = picture.size
        quality, mask = measure(picture.stored_pixels(), resolution), picture.stored_mask()
        facts.append(PhotoFacts(picture.name, width, height, picture.digest, quality, picture.caption,
                                "input" if picture.caption else "",
                                "input" if _hides_something(mask) else "", mask=small_mask(mask)))
    return Report(tuple(facts), what=what)


def prior_warnings(composition: Composition) -> list[PhotoWarning]:
    """A warning if prior pictures have no effect with a method of this composition."""
    if composition != WORDS:
        return []
    return [PhotoWarning("prior",
                         "prior pictures have no effect on a word-bound concept, because it acts through "
                         "its own words only; its class noun keeps its meaning without them")]


def no_drawings(report: Report, base: str) -> list[PhotoWarning]:
    """A warning if pictures look like photos, and the base draws nothing but drawings.

    Args:
        report: On photos or prior pictures.
        base: What the user calls it; empty = any other base.
    """
    if not base or not report.photos:
        return []
    roughness = sum(photo.quality.roughness for photo in report.photos) / len(report.photos)
    if roughness < PHOTO_ROUGHNESS:
        return []
    who = "these" if report.what == "photo" else f"the {report.what}s"
    return [PhotoWarning("photos", f"{who} look like photos, and the base {base} knows only drawings: what "
                         "it draws of them may be noise; photos need a checkpoint such as SD1.5 or SDXL")]


def own_photos_warnings(photos: Sequence[PhotoFacts], prior: Sequence[PhotoFacts],
                        earlier: Iterable[str] = ()) -> list[PhotoWarning]:
    """A warning if prior pictures are photos of the concept, or nearly alike: the class noun would then learn
    its look.

    Args:
        photos: The concept's.
        prior: The prior pictures.
        earlier: Digests of photos that the concept was learned from before.
    """
    own, together = {*earlier, *(photo.digest for photo in photos)} - {""}, [*photos, *prior]
    count, found = len(photos), {i for i, picture in enumerate(prior) if picture.digest in own}
    for group in alike([facts.quality for facts in together]):
        if group[0] < count:
            found |= {i - count for i in group if i >= count}
    if not found:
        return []
    which, is_one = listed(prior[i].name for i in sorted(found)), len(found) == 1
    text = (f"{which} {'is a photo' if is_one else 'are photos'} of the concept, too; prior pictures should "
            "show others of its class, because otherwise its class noun learns its look")
    return [PhotoWarning("prior", text, tuple(sorted(found)))]


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listed(names: Iterable[str]) -> str:
    """`a, b and c`, or `a, b and 5 more`."""
    names = list(names)
    shown = names if len(names) <= NAMED else [*names[:NAMED - 1], f"{len(names) - NAMED + 1} more"]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _few(report: Report) -> list[PhotoWarning]:
    count = len(report.photos)
    if count >= FEWEST or report.what != "photo":
        return []
    return [PhotoWarning("few",
                         f"there {'is' if count == 1 else 'are'} only {counted(count, 'photo')}; use 3 to "
                         "10 in different places, so that the concept is not confused with its background")]


def _duplicates(photos: Sequence[PhotoFacts]) -> list[PhotoWarning]:
    same: dict[str, list[int]] = {}
    for i, photo in enumerate(photos):
        same.setdefault(photo.digest or f"photo {i}", []).append(i)
    warnings = []
    for group in same.values():
        if len(group) > 1:
            warnings.append(PhotoWarning("duplicate",
                                    f"{listed(photos[i].name for i in group)} are the same picture; it "
                                    f"counts {len(group)} times", tuple(group)))
    for group in alike([photo.quality for photo in photos]):
        if len({photos[i].digest for i in group}) > 1:
            warnings.append(PhotoWarning("alike",
                                    f"{listed(photos[i].name for i in group)} are nearly alike; such "
                                    "photos teach little more than one of them", tuple(group)))
    return warnings


def _small(photos: Sequence[PhotoFacts], resolution: int | None) -> list[PhotoWarning]:
    small = [i for i, photo in enumerate(photos)
             if resolution and min(photo.width, photo.height) * ENLARGED < resolution]
    if not small:
        return []
    names = listed(f"{photos[i].name} ({photos[i].width}x{photos[i].height})" for i in small)
    return [PhotoWarning("small",
                    f"{names} {'is' if len(small) == 1 else 'are'} small for the resolution {resolution} "
                    "and will be enlarged", tuple(small))]


def _blurred(photos: Sequence[PhotoFacts]) -> list[PhotoWarning]:
    warnings = []
    for kind, chosen, text in (
            ("blurred", lambda s: s is not None and s < BLURRED,
             "blurred; pictures of the concept will be too"),
            ("flat", lambda s: s is None, "of one colour; there is nothing to learn from")):
        found = tuple(i for i, photo in enumerate(photos) if chosen(photo.quality.sharpness))
        if found:
            names = listed(photos[i].name for i in found)
            warnings.append(PhotoWarning(kind, f"{names} {'is' if len(found) == 1 else 'are'} {text}", found))
    return warnings


def _known(photos: Sequence[PhotoFacts], infos: Mapping[str, ConceptInfo], but: str) -> list[PhotoWarning]:
    warnings = []
    for name, info in infos.items():
        images = set(info.provenance.images)
        found = tuple(i for i, photo in enumerate(photos) if photo.digest and photo.digest in images)
        if found and name != but:
            which = listed(photos[i].name for i in found)
            warnings.append(PhotoWarning("bank",
                                    f"{which} {'is' if len(found) == 1 else 'are'} in the bank already, "
                                    f"learned as <{name}>", found))
    return warnings

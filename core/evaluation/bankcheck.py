"""Evaluates a bank on a base: similarity of each concept's pictures to its photos, confused concepts, and
base change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bank.bank import ConceptBank
from ..bank.prompts import PLACE
from ..data.reading import to_pixels
from ..errors import ConceptError
from ..images import opened
from ..model.backbone import Backbone
from ..sampling.sampling import sample
from ..sampling.settings import SampleSettings
from . import metrics

PHOTOS, THUMBNAIL = "photos", "thumbnail"
SOURCE_IN_JSON = {PHOTOS: "photos", THUMBNAIL: "cover"}
# pictures [3, H, W] in -1..1 of any sizes -> unit vectors [n, D]
Encode = Callable[[Sequence[Tensor]], Tensor]
Progress = Callable[[int, int, Tensor], None]      # done, total, the latest picture


@dataclass(frozen=True)
class Reference:
    """Reference pictures of a concept.

    pictures: each `[3, H, W]` in -1..1; source: PHOTOS, or THUMBNAIL for the bank's thumbnail.
    """

    pictures: tuple[Tensor, ...]
    source: str


@dataclass(frozen=True)
class BankReport:
    """Results of `check_bank`.

    references: concept -> Reference; pictures: concept -> generated pictures, `[M, 3, H, W]` in -1..1;
    confusion: `[K, K]`, see `metrics.confusion`; base_change: mean over the prompts without concepts, see
    `metrics.base_change`, or None without such prompts.
    """

    references: Mapping[str, Reference]
    pictures: Mapping[str, Tensor]
    confusion: Tensor
    base_change: float | None

    @property
    def names(self) -> list[str]:
        return list(self.pictures)

    def alignment(self, row: int) -> float:
        """Image alignment of a concept."""
        return float(self.confusion[row, row])

    def nearest(self, row: int) -> str:
        """The concept whose references are most similar to a concept's pictures."""
        return self.names[int(self.confusion[row].argmax())]

    def to_json(self) -> dict:
        concepts = {}
        for i, name in enumerate(self.names):
            reference = self.references[name]
            concepts[name] = {"image_alignment": self.alignment(i),
                              "compared_with": SOURCE_IN_JSON[reference.source],
                              "references": len(reference.pictures), "pictures": len(self.pictures[name]),
                              "most_like": self.nearest(i)}
        unchanged = None if self.base_change is None else self.base_change == 0
        return {"concepts": concepts, "bleed": {"names": self.names, "matrix": self.confusion.tolist()},
                "base_drift": self.base_change, "base_unchanged": unchanged}


def references_of(bank: ConceptBank, names: Sequence[str],
                  photos: Mapping[str, Sequence[Tensor]]) -> dict[str, Reference]:
    """The photos of each concept, or its thumbnail if there are no photos.

    Args:
        photos: Concept -> photos, each `[3, H, W]` in -1..1.

    Raises:
        ConceptError: A concept has neither, or there are photos of an unknown concept.
    """
    for name in photos:
        if name not in bank:
            raise ConceptError(f"there are photos of '{name}', which the bank does not hold; it holds "
                               f"{', '.join(bank.names)}")
    references = {}
    for name in names:
        if photos.get(name):
            references[name] = Reference(tuple(photos[name]), PHOTOS)
            continue
        thumbnail = opened(bank[name].thumbnail)
        if thumbnail is None:
            raise ConceptError(f"concept '{name}' has neither photos nor a thumbnail to be compared with; "
                               "connect photos of it")
        references[name] = Reference((to_pixels(thumbnail),), THUMBNAIL)
    return references


def prompts_for(name: str, lines: Sequence[str]) -> list[str]:
    """Fills a concept's placeholder into lines with {}. Raises ConceptError for a line without {}."""
    for line in lines:
        if PLACE not in line:
            raise ConceptError(f"the prompt {line!r} does not name the concept; write {PLACE} in its "
                               "place")
    return [line.replace(PLACE, f"<{name}>") for line in lines]


def _check_unrelated(bank: ConceptBank, prompts: Sequence[str]) -> None:
    for prompt in prompts:
        named = bank.parse(prompt).concepts
        if named:
            raise ConceptError(f"the base prompt {prompt!r} names <{named[0]}>; base prompts are those "
                               "without concepts")


def check_bank(backbone: Backbone, bank: ConceptBank, references: Mapping[str, Reference],
               prompts: Sequence[str],
               base_prompts: Sequence[str], encode: Encode, seeds: Sequence[int], settings: SampleSettings,
               progress: Progress) -> BankReport:
    """Samples each concept with every prompt and seed, and compares the pictures with the references.

    Args:
        references: Concept -> Reference; these concepts are evaluated.
        prompts: Prompts with {} for the concept.
        base_prompts: Prompts without concepts, sampled with and without the bank.
        encode: Encodes pictures `[3, H, W]` of any sizes to unit vectors `[n, D]`.
        progress: Called with (done, total, latest picture); it may raise to cancel.

    Raises:
        ConceptError: when there is nothing to draw, a prompt is wrong, the bank does not fit, or the encoder
        gives NaN.
    """
    if not references or not prompts or not seeds:
        raise ConceptError(f"there are {len(references)} concepts, {len(prompts)} prompts and {len(seeds)} "
                           "seeds; one or more of each are needed")
    bank.check_fits(backbone.layout)
    _check_unrelated(bank, base_prompts)
    prompts_of = {name: prompts_for(name, prompts) for name in references}
    done, total = 0, len(references) * len(prompts) + 2 * len(base_prompts)

    def draw(bank: ConceptBank, prompt: str) -> Tensor:
        nonlocal done
        pictures = sample(backbone, bank, [prompt] * len(seeds), seeds, settings)
        done += 1
        progress(done, total, pictures[0])
        return pictures

    pictures = {name: torch.cat([draw(bank, prompt) for prompt in lines])
                for name, lines in prompts_of.items()}
    empty = ConceptBank(backbone.layout)
    changes = [metrics.base_change(draw(empty, prompt), draw(bank, prompt)) for prompt in base_prompts]
    real = [encode(reference.pictures) for reference in references.values()]
    confusion = metrics.confusion([encode(list(drawn)) for drawn in pictures.values()], real)
    if not torch.isfinite(confusion).all():
        raise ConceptError("the picture features are NaN; choose another vision model, or a lower cfg")
    return BankReport(dict(references), pictures, confusion, sum(changes) / len(changes) if changes else None)

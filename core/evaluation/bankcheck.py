"""How good a bank is on a base: every concept's pictures against its photos, who is mistaken for whom, whether the base is what it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bank.bank import ConceptBank
from ..data.photos import to_pixels
from ..errors import ConceptError
from ..images import opened
from ..model.backbone import Backbone
from ..sampling.sampling import sample
from ..sampling.settings import SampleSettings
from . import metrics

PLACE = "{}"      # where a prompt names the concept
Encode = Callable[[Sequence[Tensor]], Tensor]      # pictures [3, H, W] in -1..1 of any sizes -> unit vectors [n, D]
Progress = Callable[[int, int, Tensor], None]


@dataclass(frozen=True)
class Reference:
    """Real pictures of a concept, each `[3, H, W]` in -1..1; source: "photos", or "cover" for the one that the bank keeps."""

    pictures: tuple[Tensor, ...]
    source: str


@dataclass(frozen=True)
class BankReport:
    """references and pictures: concept -> what it was compared with, and its pictures `[M, 3, H, W]` in -1..1; bleed: `[K, K]`, mean cosine
    of row's pictures with column's references, the diagonal is image alignment; drift: of prompts without concepts, 0 = bit for bit,
    None = none were drawn."""

    references: Mapping[str, Reference]
    pictures: Mapping[str, Tensor]
    bleed: Tensor
    drift: float | None

    @property
    def names(self) -> list[str]:
        return list(self.pictures)

    def nearest(self, row: int) -> str:
        """The concept whose references a concept's pictures are most like."""
        return self.names[int(self.bleed[row].argmax())]

    def to_json(self) -> dict:
        names = self.names
        concepts = {name: {"image_alignment": float(self.bleed[i, i]), "compared_with": self.references[name].source,
                           "references": len(self.references[name].pictures), "pictures": len(self.pictures[name]),
                           "most_like": self.nearest(i)} for i, name in enumerate(names)}
        return {"concepts": concepts, "bleed": {"names": names, "matrix": self.bleed.tolist()},
                "base_drift": self.drift, "base_unchanged": None if self.drift is None else self.drift == 0}


def references_of(bank: ConceptBank, names: Sequence[str], photos: Mapping[str, Sequence[Tensor]]) -> dict[str, Reference]:
    """Photos where there are any, else the thumbnail. Raises ConceptError for a concept with neither, and for photos of an unknown one."""
    for name in photos:
        if name not in bank:
            raise ConceptError(f"there are photos of '{name}', which the bank does not hold; it holds {', '.join(bank.names)}")
    found = {}
    for name in names:
        thumbnail = None if photos.get(name) else opened(bank[name].thumbnail)
        if not photos.get(name) and thumbnail is None:
            raise ConceptError(f"concept '{name}' has neither photos nor a thumbnail to be compared with; connect photos of it")
        found[name] = Reference((to_pixels(thumbnail),), "cover") if thumbnail is not None else Reference(tuple(photos[name]), "photos")
    return found


def prompts_for(name: str, lines: Sequence[str]) -> list[str]:
    """Prompts of a concept; every line must say where it is."""
    for line in lines:
        if PLACE not in line:
            raise ConceptError(f"the prompt {line!r} does not name the concept; write {PLACE} where it is to be")
    return [line.replace(PLACE, f"<{name}>") for line in lines]


def _check_unrelated(bank: ConceptBank, prompts: Sequence[str]) -> None:
    for prompt in prompts:
        named = bank.parse(prompt).concepts
        if named:
            raise ConceptError(f"the base prompt {prompt!r} names <{named[0]}>; base prompts are those without concepts")


def check_bank(backbone: Backbone, bank: ConceptBank, references: Mapping[str, Reference], prompts: Sequence[str],
               unrelated: Sequence[str], encode: Encode, seeds: Sequence[int], settings: SampleSettings, progress: Progress) -> BankReport:
    """Draws every concept in `references` with each prompt and seed and compares. prompts: with {} for the concept; unrelated: prompts
    without concepts, drawn with the bank and without; encode: pictures `[3, H, W]` of any sizes to unit vectors `[n, D]`;
    progress: (done, total, a picture just drawn)."""
    if not references or not prompts or not seeds:
        raise ConceptError(f"there are {len(references)} concepts, {len(prompts)} prompts and {len(seeds)} seeds; one or more of each are "
                           "needed")
    bank.check_fits(backbone.layout)
    _check_unrelated(bank, unrelated)
    asked = {name: prompts_for(name, prompts) for name in references}
    done, total = 0, len(references) * len(prompts) + 2 * len(unrelated)

    def draw(held: ConceptBank, prompt: str) -> Tensor:
        nonlocal done
        pictures = sample(backbone, held, [prompt] * len(seeds), seeds, settings)
        done += 1
        progress(done, total, pictures[0])
        return pictures

    pictures = {name: torch.cat([draw(bank, prompt) for prompt in lines]) for name, lines in asked.items()}
    empty = ConceptBank(backbone.layout)
    drifts = [metrics.drift(draw(empty, prompt), draw(bank, prompt)) for prompt in unrelated]
    real = [encode(reference.pictures) for reference in references.values()]
    bleed = metrics.bleed([encode(list(own)) for own in pictures.values()], real)
    if not torch.isfinite(bleed).all():
        raise ConceptError("the picture features are no numbers (NaN); choose another vision model, or fewer cfg")
    return BankReport(dict(references), pictures, bleed, sum(drifts) / len(drifts) if drifts else None)

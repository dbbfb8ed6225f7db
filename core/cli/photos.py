"""Reads the photos for the command `learn`, and reports on them before learning."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace

from ..bank.bank import ConceptBank
from ..bank.concepts import ConceptInfo, Provenance
from ..bank.tokens import default_words
from ..data.folder import Photos, read_folder
from ..data.listing import pictures_in
from ..data.pictures import Picture
from ..data.report import no_drawings, own_photos_warnings, prior_warnings
from ..data.training_set import check_captions
from ..methods.base import Method
from ..training.config import TrainingConfig
from .backbones import called, is_embedded


def info_of(options: Namespace, method: Method) -> ConceptInfo:
    """What the options say about the concept."""
    words = options.words or default_words(options.name, method.words_of_kind(options.kind))
    return ConceptInfo(options.name, options.noun, method.name, words, options.kind,
                       Provenance(variant_of=options.variant_of or ""))


@dataclass(frozen=True)
class TrainingPhotos:
    """The photos of a concept, and its prior-preservation pictures if there are any."""

    photos: Photos
    prior: Photos | None

    def checked(self, options: Namespace, training: TrainingConfig, stored: ConceptBank | None,
                method: Method) -> TrainingPhotos:
        """The same with warnings in the reports.

        Args:
            stored: The bank; None for a new one.

        Raises:
            ConceptError: A caption names an unknown concept.
        """
        infos = {} if stored is None else dict(stored.infos)
        info = info_of(options, method)
        known = [*infos.values(), info]
        on_captions = check_captions(self.photos.pictures, known, info)
        drawing_base = called(options) if is_embedded(options) else ""
        report = self.photos.report.checked(training.resolution, training.framing != "buckets", infos,
                                            options.name, drawing_base)
        report = replace(report, warnings=(*report.warnings, *on_captions))
        prior = self.prior
        if prior is not None:
            earlier = infos[options.name].provenance.images if options.name in infos else ()
            warnings = (*prior.report.warnings, *check_captions(prior.pictures, known),
                        *own_photos_warnings(report.photos, prior.report.photos, earlier),
                        *no_drawings(prior.report, drawing_base),
                        *prior_warnings(method.composition_of_kind(options.kind)))
            prior = Photos(prior.pictures, replace(prior.report, warnings=warnings))
        return TrainingPhotos(Photos(self.photos.pictures, report), prior)

    @property
    def pictures(self) -> list[Picture]:
        return [*self.photos.pictures, *(self.prior.pictures if self.prior is not None else [])]

    def lines(self) -> list[str]:
        return [*self.photos.report.lines(), *(self.prior.report.lines() if self.prior is not None else [])]

    def to_json(self) -> dict:
        prior = {} if self.prior is None else {"prior": self.prior.report.to_json()}
        return {**self.photos.report.to_json(), **prior}


def read_photos(options: Namespace, resolution: int) -> TrainingPhotos:
    """Reads the photos and prior pictures that the options name."""
    photos = read_folder(options.images, options.captions, options.masks, subfolders=options.subfolders,
                         resolution=resolution, find_subject=options.find_subject,
                         templates=options.kind if options.caption_templates else "")
    prior = None
    if options.prior is not None:
        # kohya's folders of prior pictures may have subfolders (1_dog) or not
        subfolders = options.subfolders and options.prior.is_dir() and not pictures_in(options.prior)
        prior = read_folder(options.prior, is_prior=True, class_noun=options.noun, subfolders=subfolders,
                            resolution=resolution)
    return TrainingPhotos(photos, prior)

"""The command `learn`: learns a concept from a folder of photos into a bank."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

from ..bank.bank import ConceptBank
from ..bank.concepts import Concept
from ..bank.format import open_bank
from ..bank.store import add_concept, replace_concept
from ..bank.tokens import check_class_noun, check_name
from ..data.framing import Framing, Picture
from ..data.photos import file_digests, read_folder
from ..data.training_set import prepare
from ..evaluation.previews import concept_prompt
from ..images import thumbnail_of
from ..methods.base import Task, make
from ..model.backbone import Backbone
from ..sampling.sampling import sample
from ..sampling.settings import SampleSettings
from ..training import checkpoint as checkpoints
from ..training.config import TrainingConfig
from ..training.loop import learn as learn_concept
from ..training.process_group import process_group
from ..training.trainer import StepInfo
from . import backbones
from .result import Result


def _thumbnail(backbone: Backbone, bank: ConceptBank, name: str, kind: str, size: int, cfg: float) -> bytes:
    """A small picture of the concept as a JPEG."""
    settings = SampleSettings(steps=20, cfg=cfg, size=(size, size))
    return thumbnail_of(sample(backbone, bank, [concept_prompt(name, kind)], [0], settings)[0])


def _training(options: Namespace) -> TrainingConfig:
    """The training configuration from the given flags, with the base's defaults for the others."""
    defaults = backbones.EMBEDDED_TRAINING if backbones.is_embedded(options) else TrainingConfig()
    values = {field.name: getattr(options, field.name) for field in fields(TrainingConfig)}
    return replace(defaults, **{name: value for name, value in values.items() if value is not None})


def _task(options: Namespace, backbone: Backbone, bank: ConceptBank, seed: int) -> Task:
    words = tuple(word.strip() for word in options.words.split(",") if word.strip())
    generator = torch.Generator().manual_seed(seed)
    return Task(options.name, options.noun, backbone, bank, options.kind, words, generator)


def _renew_digests(checkpoint: Path, folder: Path, photos: list[Picture]) -> None:
    """Checkpoints of early versions name photos by the digests of their files. Where the files are still the
    same, the digests of today take their place, so that the run can go on."""
    images = checkpoints.identity(checkpoint).get("images") if checkpoint.exists() else None
    if images and images == file_digests(folder):
        state = checkpoints.load(checkpoint)
        state["identity"]["images"] = [photo.digest for photo in photos]
        checkpoints.save(checkpoint, state)


def learn(options: Namespace) -> Result | None:
    """Adds one concept to the bank on disk. The file is replaced only when the concept is complete.

    Under torchrun, all processes train the concept together, and the first one writes and prints.
    """
    check_name(options.name)
    options.noun = check_class_noun(options.noun)
    pictures = read_folder(options.images, options.captions, options.masks)
    checkpoint = options.bank.with_name(f".{options.bank.name}.{options.name}.checkpoint")
    _renew_digests(checkpoint, options.images, pictures)
    if options.prior is not None:
        pictures += read_folder(options.prior, is_prior=True)
    rates = backbones.EMBEDDED_RATES if backbones.is_embedded(options) else {}
    method, training = make(options.method, {**rates, **dict(options.settings)}), _training(options)
    # reports a damaged bank before the base is loaded
    stored = open_bank(options.bank) if options.bank.exists() else None
    framing = Framing(training.resolution, training.framing, training.flip)
    with process_group(options.device) as group:
        backbone = backbones.load_backbone(options)
        bank = stored or ConceptBank(backbone.layout)
        task = _task(options, backbone, bank, training.seed)
        data = prepare(backbone, pictures, options.name, options.noun, framing)
        is_quiet = options.json or not group.is_first
        with tqdm(total=training.steps, desc=f"learning <{options.name}>", disable=is_quiet) as bar:
            learned = learn_concept(task, method, data, training, lambda info: _show(bar, info), checkpoint,
                                    group=group)
        if not group.is_first:
            return None
    # Saved before sampling the thumbnail, because a failure there must not lose the concept.
    add_concept(options.bank, learned.concept, learned.bank.shared, bank)
    checkpoint.unlink(missing_ok=True)
    thumbnail = _thumbnail(backbone, learned.bank, options.name, options.kind, training.resolution,
                           backbones.guidance_of(options))
    concept = replace(learned.concept, thumbnail=thumbnail)
    return _report(options, concept, replace_concept(options.bank, concept), learned.losses)


def _show(bar: tqdm, info: StepInfo) -> None:
    bar.update(info.step - bar.n)
    figures = {name: f"{value:.2e}" for name, value in info.monitors.items()}
    bar.set_postfix({"loss": f"{info.loss:.3f}", **figures}, refresh=False)


def _report(options: Namespace, concept: Concept, bank: ConceptBank, losses: tuple[float, ...]) -> Result:
    info = concept.info
    facts = {
        "bank": str(options.bank),
        "concept": concept.name,
        "placeholder": info.placeholder,
        "words": list(info.words),
        "method": options.method,
        "steps": len(losses),
        "final_loss": losses[-1],
        "seconds": info.provenance.seconds,
        "bytes": concept.nbytes(),
        "concepts": bank.names,
    }
    names = ", ".join(f"<{name}>" for name in bank.names)
    return facts, [f"learned {info.placeholder} in {facts['seconds']:.0f} s; {options.bank} holds {names}"]

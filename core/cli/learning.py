"""The command `learn`: learns a concept from a folder of photos into a bank."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

from ..bank.bank import ConceptBank
from ..bank.concepts import KINDS, Concept, ConceptInfo
from ..bank.format import open_bank
from ..bank.hints import notes_on_base
from ..bank.store import add_concept, replace_concept, saved_elsewhere
from ..bank.tokens import check_class_noun, check_name, default_words
from ..data.framing import Framing
from ..data.listing import file_digests
from ..data.pictures import Picture
from ..data.training_set import prepare
from ..errors import ConceptError
from ..evaluation.collisions import warnings_before
from ..evaluation.previews import Previews, concept_prompt
from ..evaluation.protocol import Encoder
from ..images import thumbnail_of
from ..interop.export import EXPORTING
from ..methods import DEFAULT
from ..methods.base import Method, Task, get, make
from ..model.backbone import Backbone
from ..sampling.sampling import sample
from ..sampling.settings import SampleSettings
from ..settings import read_settings, unusual
from ..training import checkpoint as checkpoints
from ..training.config import TrainingConfig
from ..training.loop import learn as learn_concept
from ..training.presets import FOR_OTHERS, check_for_others
from ..training.process_group import ProcessGroup, process_group
from ..training.record import Learned, check_known, is_finished
from ..training.refinement import (
    check_refinable,
    check_start,
    check_variant,
    knows_all,
    notes_on_photos,
    settings_of,
    with_replay,
)
from ..training.trainer import StepInfo
from . import backbones
from .photos import info_of, read_photos
from .result import Result, complain, say
from .sheets import check_sheet, write_sheet
from .states import encoder_of, judging_of, previews_of, with_proposed

KEEP, AGAIN, REFINE = "keep", "again", "refine"
IF_KNOWN = (KEEP, AGAIN, REFINE)


def _thumbnail(backbone: Backbone, bank: ConceptBank, name: str, kind: str, size: int, cfg: float) -> bytes:
    """A small picture of the concept as a JPEG."""
    settings = SampleSettings(steps=20, cfg=cfg, size=(size, size))
    return thumbnail_of(sample(backbone, bank, [concept_prompt(name, kind)], [0], settings)[0])


def _training(options: Namespace) -> TrainingConfig:
    """The training configuration from the given flags, with the base's defaults for the others."""
    defaults = backbones.training_of(options)
    values = {field.name: getattr(options, field.name) for field in fields(TrainingConfig)}
    return replace(defaults, **{name: value for name, value in values.items() if value is not None})


def _task(options: Namespace, backbone: Backbone, stored: ConceptBank | None, seed: int,
          encoder: Encoder | None) -> Task:
    """The task on the stored bank without the concept; None for a new bank."""
    bank = stored or ConceptBank(backbone.layout)
    bank = bank.remove(options.name) if options.name in bank else bank
    return Task(options.name, options.noun, backbone, bank, options.kind, options.words,
                torch.Generator().manual_seed(seed),
                encode=None if encoder is None else encoder.image_text_features,
                refined=stored if options.if_known == REFINE else None,
                parent=stored[options.variant_of] if stored is not None and options.variant_of else None)


def _renew_digests(checkpoint: Path, folder: Path, photos: list[Picture]) -> None:
    """Checkpoints of early versions name photos by the digests of their files. Where the files are still the
    same, the digests of today take their place, so that the run can go on."""
    images = checkpoints.identity(checkpoint).get("images") if checkpoint.exists() else None
    if images and images == file_digests(folder):
        state = checkpoints.load(checkpoint)
        state["identity"]["images"] = [photo.digest for photo in photos]
        checkpoints.save(checkpoint, state)


def _chosen(options: Namespace, stored: ConceptBank | None) -> ConceptInfo | None:
    """Fills in what was not given. Returns the header of the concept that learning goes on from; None if it
    begins anew."""
    info = None
    if options.if_known == REFINE and options.variant_of:
        raise ConceptError(f"--variant-of is '{options.variant_of}', which begins a new concept, and "
                           "--if-known is 'refine', which continues from one; give one of them")
    if options.if_known == REFINE:
        info = check_refinable(stored, options.name, class_noun=options.noun, kind=options.kind or "",
                               method=options.method or "", words=options.words)
        options.noun, options.words = info.class_noun, info.words
    elif options.variant_of:
        info = check_variant(stored, options.variant_of, options.name, kind=options.kind or "",
                             method=options.method or "").info
        options.noun = options.noun or info.class_noun
        options.words = options.words or default_words(options.name, len(info.words))
    preset = backbones.preset_of(options)
    usual = KINDS[0] if preset is None else preset.kind
    options.kind = options.kind or (usual if info is None else info.kind)
    plain = FOR_OTHERS if options.for_other_programs else DEFAULT
    options.method = options.method or (plain if info is None else info.method)
    if options.for_other_programs and options.method != FOR_OTHERS:
        raise ConceptError(f"--for-other-programs needs the method '{FOR_OTHERS}', but the method is "
                           f"'{options.method}'; leave one of them out")
    return info


def _known(options: Namespace, stored: ConceptBank, info: ConceptInfo, method: Method,
           training: TrainingConfig, photos: list[Picture]) -> Result:
    """The result for a concept that the bank holds already. info: what would be learned now."""
    check_known(stored.infos[options.name], info, method, training, [photo.digest for photo in photos],
                "give --if-known again to replace it")
    return _unchanged(options, stored, "learned from these photos with these settings")


def _unchanged(options: Namespace, stored: ConceptBank, why: str) -> Result:
    """The result for a concept that stays as it is."""
    concept = stored[options.name]
    facts = {**_facts(options, concept, stored), "learned": False}
    return facts, [f"{concept.info.placeholder} is in {options.bank} already, {why}; nothing was changed"]


def _warn(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        complain(f"warning: {sentence}")


def _checked_bank(options: Namespace) -> tuple[Path, ConceptBank | None]:
    """The bank's file, and what it holds. A damaged bank is reported before the photos are read and the base
    is loaded."""
    file = backbones.bank_output(options.bank)
    return file, open_bank(file) if os.path.exists(file) else None


def check_options(options: Namespace) -> None:
    """Checks the options that several concepts have in common, before any of them is learned.

    Raises:
        ConceptError: The bank cannot be used, a setting is wrong, or the folder of prior pictures is missing.
    """
    _checked_bank(options)
    if options.if_known != REFINE:      # else each concept has a method of its own
        chosen = Namespace(**{**vars(options), "method": options.method or DEFAULT})
        make(chosen.method, _method_settings(chosen))
        if options.for_other_programs:
            check_for_others(_method_settings(chosen))
    _training(options)
    if options.prior is not None and not options.prior.exists():
        raise ConceptError(f"the picture folder '{options.prior}' does not exist")
    backbones.check_base(options)


def learn(options: Namespace) -> Result | None:
    """Adds one concept to the bank on disk. The file is replaced only when the concept is complete.

    Under torchrun, all processes train the concept together, and the first one writes and prints.
    """
    check_name(options.name)
    options.noun = check_class_noun(options.noun)
    file, stored = _checked_bank(options)
    if options.contact_sheet is not None:
        check_sheet(options.contact_sheet, (options.images, options.captions, options.masks, options.prior))
    start = _chosen(options, stored)
    refined = start if options.if_known == REFINE else None
    judging = judging_of(options)
    usual = backbones.method_defaults(options)
    settings = _method_settings(options)
    if options.for_other_programs:
        check_for_others(settings)
    method = make(options.method,
                  {**usual, **settings} if start is None else settings_of(start, settings))
    words = len(options.words or ()) or method.words_of_kind(options.kind)
    if not options.noun and words > 1:
        raise ConceptError(f"class noun of concept '{options.name}' is empty; give with --noun an ordinary "
                           "word for it, such as dog or painting, from which learning starts")
    training = _training(options)
    if judging is not None:
        judging.check_prompts(info_of(options, method), () if stored is None else stored.infos.values())
    backbones.device_of(options)
    encoder = encoder_of(options, training)
    backbones.check_base(options)
    read = read_photos(options, training.resolution)
    photos = read.photos.pictures
    checkpoint = checkpoints.file_beside(file, options.name)
    _renew_digests(checkpoint, options.images, photos)
    read = read.checked(options, training, stored, method)
    with process_group(options.device) as group:
        if group.is_first and not options.json:
            chosen = backbones.preset_of(options)
            say("\n".join([*read.lines(),
                           *([] if chosen is None else [chosen.describe(method, training)])]))
        if group.is_first and options.contact_sheet is not None:
            write_sheet(options.contact_sheet, read.photos.report)
        if stored is not None and options.name in stored and options.if_known == KEEP:
            result = _known(options, stored, info_of(options, method), method, training, photos)
            _complete(options, file, stored, checkpoint, training.resolution, group)
            return result if group.is_first else None
        if refined is not None and stored is not None and knows_all(refined, photos):
            _complete(options, file, stored, checkpoint, training.resolution, group)
            return _unchanged(options, stored, "learned from these photos") if group.is_first else None
        backbone = backbones.load_backbone(options)
        if stored is not None:
            stored.check_fits(backbone.layout)
        if options.for_other_programs:
            backbone.layout.refuse_joint(EXPORTING)
        training.check_schedule(backbone.schedule)
        task = _task(options, backbone, stored, training.seed, encoder)
        check_start(task, method)
        warnings = [*unusual(method.config), *unusual(training),
                    *([] if stored is None else notes_on_base(stored.infos.values(), backbone.layout,
                                                              backbone.fingerprint)),
                    *warnings_before(task.bank, options.name, options.noun, options.method, options.kind,
                                     [photo.digest for photo in photos]),
                    *([] if refined is None else notes_on_photos(refined, photos))]
        _warn(warnings if group.is_first else ())
        previews = previews_of(options, training, backbone, photos, encoder)
        pictures = with_replay(task, read.pictures, training, backbones.guidance_of(options))
        keep = () if judging is None else judging.steps(training.steps)
        learned = _train(options, task, method, pictures, training, previews, checkpoint, group, keep)
        if not group.is_first:
            return None
    states: list[dict] = []
    on_states: list[str] = []
    if judging is not None:
        learned, states, on_states = with_proposed(options, judging, learned, task, training, photos, encoder)
    concept, grown = _saved(options, file, learned, task, training.resolution)
    checkpoint.unlink(missing_ok=True)
    facts, lines = _report(options, concept, grown, learned.losses, training, warnings, read.to_json())
    return ({**facts, "states": states} if states else facts), [*lines, *on_states]


def _train(options: Namespace, task: Task, method: Method, pictures: list[Picture], training: TrainingConfig,
           previews: Previews | None, checkpoint: Path, group: ProcessGroup,
           keep: tuple[int, ...]) -> Learned:
    framing = Framing(training.resolution, training.framing, training.flip)
    data = prepare(task.backbone, pictures, task.name, task.class_noun, framing)
    is_quiet = options.json or not group.is_first
    with tqdm(total=training.steps, desc=f"learning <{task.name}>", disable=is_quiet) as bar:
        return learn_concept(task, method, data, training, lambda info: _show(bar, info), checkpoint,
                             group=group, evaluator=None if previews is None else previews.evaluate,
                             keep=keep, say=(lambda line: None) if is_quiet else bar.write)


def _saved(options: Namespace, file: Path, learned: Learned, task: Task,
           size: int) -> tuple[Concept, ConceptBank]:
    """Writes the concept, samples its thumbnail and adds it. Returns the concept and the bank on disk.

    The concept is written first, because a failure of the thumbnail must not lose it. size: side of the
    thumbnail's picture in pixels.
    """
    try:
        add_concept(file, learned.concept, learned.bank.shared, task.bank, options.if_known == AGAIN,
                    in_place=task.refined is not None)
    except ConceptError as error:
        alone = ConceptBank(task.bank.layout).add(learned.concept, learned.bank.shared)
        raise saved_elsewhere(error, file, alone) from error
    thumbnail = _thumbnail(task.backbone, learned.bank, task.name, task.kind, size,
                           backbones.guidance_of(options))
    concept = replace(learned.concept, thumbnail=thumbnail)
    return concept, replace_concept(file, concept)


def _complete(options: Namespace, file: Path, stored: ConceptBank, checkpoint: Path, size: int,
              group: ProcessGroup) -> None:
    """Completes a concept whose command was stopped after the concept was written: samples its thumbnail and
    deletes the checkpoint of the finished run.
    """
    if not group.is_first or not is_finished(checkpoint, stored.infos[options.name].provenance):
        return
    backbone = backbones.load_backbone(options)
    concept = stored[options.name]
    thumbnail = _thumbnail(backbone, stored, options.name, concept.info.kind, size,
                           backbones.guidance_of(options))
    replace_concept(file, replace(concept, thumbnail=thumbnail))
    checkpoint.unlink(missing_ok=True)


def _method_settings(options: Namespace) -> dict[str, object]:
    """The settings given by --set, --lr and --token-lr. Raises ConceptError for one of training, which has a
    flag of its own."""
    rates = {"lr": options.lr, "token_lr": options.token_lr}
    given = [*options.settings, *((name, text) for name, text in rates.items() if text is not None)]
    for name, text in given:
        if name in (field.name for field in fields(TrainingConfig)):
            raise ConceptError(f"setting '{name}' is one of training; give --{name.replace('_', '-')} {text} "
                               "instead of --set")
    return read_settings(get(options.method).config, given)


def _show(bar: tqdm, info: StepInfo) -> None:
    bar.update(info.step - bar.n)
    figures = {name: f"{value:.2e}" for name, value in info.monitors.items()}
    bar.set_postfix({"loss": f"{info.loss:.3f}", **figures}, refresh=False)


def _facts(options: Namespace, concept: Concept, bank: ConceptBank) -> dict:
    info = concept.info
    return {
        "bank": str(options.bank),
        "concept": concept.name,
        "placeholder": info.placeholder,
        "words": list(info.words),
        "method": info.method,
        "steps": info.provenance.steps,
        "seconds": info.provenance.seconds,
        "bytes": concept.nbytes(),
        "concepts": bank.names,
    }


def _report(options: Namespace, concept: Concept, bank: ConceptBank, losses: tuple[float, ...],
            training: TrainingConfig, warnings: list[str], photos: dict) -> Result:
    facts = {**_facts(options, concept, bank), "final_loss": losses[-1], "learned": True,
             "warnings": warnings, "photos": photos}
    if options.if_known == REFINE:
        facts["refined"] = [dict(run) for run in concept.info.provenance.refined]
    names = ", ".join(f"<{name}>" for name in bank.names)
    done = "refined" if options.if_known == REFINE else "learned"
    lines = [f"{done} {concept.info.placeholder} in {facts['seconds']:.0f} s; {options.bank} holds {names}"]
    if len(losses) < training.steps:
        lines.append(f"ended after {len(losses)} of {training.steps} steps, because the likeness to the "
                     "photos no longer grew")
    return facts, lines

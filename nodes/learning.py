"""Learns one concept, for the nodes that learn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ..core.bank.bank import ConceptBank
from ..core.bank.concepts import Concept, ConceptInfo, Provenance
from ..core.bank.hints import notes_on_base
from ..core.bank.tokens import default_words, typed_name
from ..core.charts import loss_picture, note_picture, thumbnails_picture
from ..core.comfy.backbone import ComfyBackbone
from ..core.data.framing import Framing
from ..core.data.pictures import Deferred, Picture, photo_digest, prior_caption
from ..core.data.report import (
    PhotoWarning,
    Report,
    counted,
    no_drawings,
    own_photos_warnings,
    prior_warnings,
    report_of,
)
from ..core.data.training_set import check_captions, prepare
from ..core.demo.bases import called
from ..core.errors import ConceptError
from ..core.evaluation.collisions import warnings_before
from ..core.evaluation.previews import (
    SCORED,
    Previews,
    concept_prompt,
    learn_with_previews,
    older_concepts,
    similarity_to,
)
from ..core.evaluation.states import Judging
from ..core.images import to_tensor
from ..core.methods import METHODS, Task, make
from ..core.methods.base import Method
from ..core.sampling.settings import SampleSettings
from ..core.settings import unusual
from ..core.training.config import TrainingConfig
from ..core.training.presets import AS_SET, HERE, NORMAL, Preset
from ..core.training.record import check_known, run_identity, run_key
from ..core.training.refinement import (
    check_refinable,
    check_start,
    check_variant,
    knows_all,
    notes_on_photos,
    settings_of,
    with_replay,
)
from . import progress
from .folders import checkpoint_file
from .images import judge, to_image
from .judging import judged, judging_of
from .presets import chosen_preset, with_preset
from .progress import WHOLE, Part, Reporter

IF_KNOWN = "if already in bank"
KEEP, AGAIN, REFINE = "keep it", "learn it again", "refine it"
OF_TRAINING = ("steps", "batch_size", "resolution", "seed")      # inputs that are fields of TrainingConfig
# inputs that saved graphs may lack
LATER = {"clip_vision": None, "stop_after": 0, "show_older": False, "preset": AS_SET, "effort": NORMAL,
         "variant_of": "", "judging": None, "readable_by": HERE}


@dataclass(frozen=True)
class Learning:
    """What a run shows.

    Attributes:
        bank: The bank with the concept.
        loss, previews, older: Pictures `[B, H, W, 3]` in 0..1.
        notes: Sentences for the person.
        proposed: The bank with the proposed state; `bank` itself where nothing was judged.
        states: Picture of the kept states.
        is_new: Whether the concept was learned now; if not, the bank held it already.
    """

    bank: ConceptBank
    loss: Tensor
    previews: Tensor
    older: Tensor
    notes: tuple[str, ...]
    proposed: ConceptBank
    states: Tensor
    is_new: bool = True


def learn_concept(given: Mapping[str, Any], bank: ConceptBank | None, photos: Sequence[Picture],
                  prior: Sequence[Tensor | Deferred] = (), node: str | None = None,
                  part: Part = WHOLE, begins: Callable[[], None] = lambda: None) -> Learning:
    """Learns one concept on top of a bank, or finds that the bank holds it.

    Args:
        given: The inputs of Concept Learner, by id, with checked name and class noun. Missing ones of
            `LATER` have their defaults.
        bank: The bank; None for a new one.
        photos: Pictures to learn from.
        prior: Other pictures of the class, `[3, H, W]` in -1..1.
        node: Id of the node that shows the progress.
        part: Which part of the node's work this is.
        begins: Called before learning, unless there is nothing to learn. It may raise a ConceptError.

    Raises:
        ConceptError: An input is wrong, or learning fails. The bank is unchanged.
    """
    given = LATER | dict(given)
    name, noun = given["name"], given["class_noun"]
    if given["if_known"] not in (KEEP, AGAIN, REFINE):
        raise ConceptError(f"'{IF_KNOWN}' is {given['if_known']!r}; allowed: {KEEP}, {AGAIN}, {REFINE}")
    known, parent = _started_from(given, bank)
    before = parent.info if parent is not None else known
    noun = noun or ("" if before is None else before.class_noun)
    chosen = chosen_preset(given, before)
    given = given if chosen is None else with_preset(given, chosen, before)
    settings = _method_settings(given, given.get("method_settings"))
    method = make(given["method"], settings if before is None else settings_of(before, settings))
    if given.get("selection") is not None:
        method.use_selection(given["selection"])
    config = _training_config(given, given.get("training_settings"), chosen)
    with torch.inference_mode(False):
        backbone = ComfyBackbone(given["model"], given["clip"], given["vae"])
        given["encode"] = judge(given["clip_vision"], backbone.layout)
        config = _with_early_stopping(config, given)
        given["judging"] = judging_of(given["judging"], given["encode"])
        config.check_schedule(backbone.schedule)
        start = ConceptBank(backbone.layout) if bank is None else bank
        start.check_fits(backbone.layout)
        task = Task(name, noun, backbone, start.remove(name) if name in start else start, given["kind"],
                    generator=torch.Generator().manual_seed(config.seed))
        if known is not None:
            if knows_all(known, photos):
                return _unchanged(start, f"<{name}> was learned from these photos already")
            task = replace(task, words=known.words, refined=start)
        if parent is not None:
            task = replace(task, words=default_words(name, len(parent.info.words)), parent=parent)
        if given["judging"] is not None:
            given["judging"].check_prompts(_info(task, method), start.infos.values())
        if name in start and given["if_known"] == KEEP:
            return _already_learned(start, _info(task, method), method, config, list(photos))
        begins()
        others = [Picture(picture, prior_caption(noun), is_prior=True) for picture in prior]
        with progress.stop_told(node):
            return _learn(task, method, config, [*photos, *others], given, node, chosen, part)


def _started_from(given: Mapping[str, Any], bank: ConceptBank | None
                  ) -> tuple[ConceptInfo | None, Concept | None]:
    """The header of the refined concept, and the parent of the variant; None for what does not apply."""
    name, parent = given["name"], typed_name(given["variant_of"])
    own = {} if given["preset"] != AS_SET else {"kind": given["kind"], "method": given["method"]}
    if given["if_known"] == REFINE:
        if parent:
            raise ConceptError(f"'variant of' is '{parent}', which begins a new concept, and '{IF_KNOWN}' "
                               f"is '{REFINE}', which continues from one; empty the first or change the "
                               "second")
        return check_refinable(bank, name, class_noun=given["class_noun"], **own), None
    return None, check_variant(bank, parent, name, **own) if parent else None


def _method_settings(given: dict, settings: dict | None) -> dict:
    """The method's settings. Learning rates of the learner replace the method's own, unless they are 0."""
    config = METHODS[given["method"]].config if given["method"] in METHODS else None
    rates = {"lr", "token_lr"} & {field.name for field in fields(config)} if config is not None else set()
    return dict(settings or {}) | {rate: given[rate] for rate in rates if given[rate] != 0}


def _training_config(given: dict, settings: dict | None, chosen: Preset | None) -> TrainingConfig:
    """Settings that are connected replace those of a preset."""
    settings = settings or {}
    unknown = sorted(set(settings) - {field.name for field in fields(TrainingConfig)})
    if unknown:
        raise ConceptError(f"training_settings holds {unknown[0]!r}, which is no setting of training; "
                           "connect Concept Training Settings")
    usual = {} if chosen is None else chosen.training
    return TrainingConfig(**{**usual, **{key: given[key] for key in OF_TRAINING}, **settings})


def _with_early_stopping(config: TrainingConfig, given: dict) -> TrainingConfig:
    """Adds the preview settings to a run's identity only if early stopping uses them, because previews alone
    do not change the result.
    """
    patience, every = given["stop_after"], given["preview_every"]
    if patience and (given["encode"] is None or not every):
        lacks = "clip_vision is not connected" if given["encode"] is None else "preview_every is 0"
        raise ConceptError(f"stop_after is {patience} but {lacks}; early stopping compares previews with the "
                           "photos; allowed without: 0")
    return replace(config, patience=patience, look_every=every) if patience else config


def _info(task: Task, method: Method) -> ConceptInfo:
    words = task.worded(method.words_of_kind(task.kind)).word_names
    origin = Provenance(variant_of="" if task.parent is None else task.parent.name)
    return ConceptInfo(task.name, task.class_noun, method.name, words, task.kind, origin)


def _already_learned(bank: ConceptBank, info: ConceptInfo, method: Method, config: TrainingConfig,
                     photos: list[Picture]) -> Learning:
    """Returns the bank unchanged if its concept was learned from these photos and settings, as when a saved
    graph runs again. info: what would be learned now.
    """
    name = info.name
    check_known(bank.infos[name], info, method, config, [photo.digest for photo in photos],
                f"set '{IF_KNOWN}' to '{AGAIN}'")
    return _unchanged(bank, f"<{name}> is in the bank already, learned from these photos")


def _unchanged(bank: ConceptBank, sentence: str) -> Learning:
    picture = to_tensor(note_picture(f"{sentence}."))
    return Learning(bank, picture, picture, _no_older_concepts(), (sentence,), bank, _no_states(),
                    is_new=False)


def _learn(task: Task, method: Method, config: TrainingConfig, pictures: list[Picture], given: dict,
           node: str | None, chosen: Preset | None, part: Part) -> Learning:
    photos = [picture for picture in pictures if not picture.is_prior]
    digests = [photo.digest for photo in photos]
    info = _info(task, method)
    on_captions = check_captions(photos, [*task.bank.infos.values(), info], info)
    taken = report_of(photos, config.resolution).checked(config.resolution, config.framing != "buckets",
                                                         task.bank.infos, task.name,
                                                         called(task.backbone.layout.embedded_base))
    warnings = [*taken.warnings, *on_captions,
                *_on_prior(task, method, taken, [picture for picture in pictures if picture.is_prior])]
    held = (task.refined or task.bank).infos.values()
    notes = [*task.backbone.learning_notes,
             *notes_on_base(held, task.backbone.layout, task.backbone.fingerprint),
             *unusual(method.config), *unusual(config),
             *warnings_before(task.bank, task.name, task.class_noun, method.name, task.kind, digests),
             *([] if task.refined is None else notes_on_photos(task.refined.infos[task.name], photos)),
             *(warning.text for warning in warnings)]
    told = tuple(notes)
    for note in told:      # before the minutes of training
        logging.warning("Concept Learner: %s", note)
    notes = [taken.headline, *told, *([] if chosen is None else [chosen.describe(method, config)])]
    size = (config.resolution, config.resolution)
    backbone, settings = task.backbone, SampleSettings(steps=15, cfg=5.0, size=size, batch=1)
    cancel = comfy.model_management.throw_exception_if_processing_interrupted

    def say(line: str) -> None:
        logging.info("Concept Learner: %s", line)
        notes.append(line)

    with backbone.training():
        check_start(task, method)
        pictures = with_replay(task, pictures, config, settings.cfg, before_each=cancel)
        encoding = part.status(f"encoding {counted(len(pictures), 'photo')}")      # minutes on a processor
        progress.say(node, "\n".join([encoding, *told]))
        data = prepare(backbone, pictures, task.name, task.class_noun,
                       Framing(config.resolution, config.framing, config.flip))
        encode = given["encode"]
        if given["clip_vision"] is not None:      # what is learned does not depend on what is installed
            task = replace(task, encode=lambda pictures: encode(list(pictures)))
        similarity = None if encode is None else similarity_to([photo.pixels for photo in photos], encode)
        judging: Judging | None = given["judging"]
        previews = Previews(backbone, concept_prompt(task.name, task.kind), settings, config.seed, similarity,
                            samples=SCORED if judging is None else judging.samples)
        report = Reporter(config.steps, given["preview_every"], previews, node, part, told)
        file = checkpoint_file(task.name, run_key(run_identity(task, method, data, config)))
        keep = () if judging is None else judging.steps(config.steps)
        learned = learn_with_previews(task, method, data, config, previews, report, file,
                                      last=given["preview_every"] > 0, keep=keep, say=say)
        report.show_last()
        bank, losses = learned.bank, learned.losses
        proposed, states, on_states = bank, _no_states(), list[str]()
        if judging is not None:
            proposed, states, on_states = judged(judging, task, learned, photos, encode, settings,
                                                 config.seed)
        older = _no_older_concepts()
        if given["show_older"] and len(task.bank):
            rows = older_concepts(backbone, bank, task.bank.names, settings, config.seed, before_each=cancel)
            older = to_tensor(thumbnails_picture(rows, columns=4))
    if len(losses) < config.steps:
        notes.append(f"ended after {len(losses)} of {config.steps} steps: the likeness to the photos no "
                     "longer grew")
    loss = to_tensor(loss_picture(losses, f"loss of <{task.name}>", previews.scores,
                                  spreads=previews.spreads))
    strip = to_image(torch.stack(previews.pictures)) if previews.pictures else loss
    return Learning(bank, loss, strip, older, (*notes, *on_states), proposed, states)


def _on_prior(task: Task, method: Method, photos: Report, prior: Sequence[Picture]) -> list[PhotoWarning]:
    """Warnings about prior pictures. photos: the report on the concept's photos."""
    if not prior:
        return []
    named = [replace(picture, name=f"prior picture {i + 1}", digest=photo_digest(picture.stored_pixels()))
             for i, picture in enumerate(prior)]
    earlier = () if task.refined is None else task.refined.infos[task.name].provenance.images
    report = report_of(named, what="prior picture")
    return [*own_photos_warnings(photos.photos, report.photos, earlier),
            *no_drawings(report, called(task.backbone.layout.embedded_base)),
            *prior_warnings(method.composition_of_kind(task.kind))]


def _no_states() -> Tensor:
    return to_tensor(note_picture("No states were kept: judging is not connected."))


def _no_older_concepts() -> Tensor:
    return to_tensor(note_picture("Older concepts were not drawn; 'draw older concepts' does that."))

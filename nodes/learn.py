"""The node ConceptLearner."""

from __future__ import annotations

import logging
from dataclasses import fields, replace

import comfy.model_management
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..core.bank.bank import ConceptBank
from ..core.bank.concepts import KINDS, ConceptInfo
from ..core.charts import loss_picture, thumbnails_picture
from ..core.comfy.backbone import ComfyBackbone
from ..core.data.framing import Framing
from ..core.data.pictures import Picture, pair_pictures, prior_caption
from ..core.data.report import prior_warnings, report_of
from ..core.data.training_set import check_captions, prepare
from ..core.errors import ConceptError
from ..core.evaluation.collisions import warnings_before
from ..core.evaluation.previews import (
    Previews,
    concept_prompt,
    learn_with_previews,
    older_concepts,
    similarity_to,
)
from ..core.files import check_output_folder
from ..core.images import to_tensor
from ..core.methods import DEFAULT, METHODS, Task, make
from ..core.methods.base import Method
from ..core.sampling.settings import SampleSettings
from ..core.settings import unusual
from ..core.training.config import TrainingConfig
from ..core.training.presets import AS_SET, NORMAL, Preset
from ..core.training.record import check_known, run_identity, run_key
from ..core.training.refinement import (
    check_refinable,
    check_start,
    knows_all,
    notes_on_photos,
    settings_of,
    with_replay,
)
from . import types
from .folders import checkpoint_file, checkpoint_folder
from .images import deferred_pictures, judge, masks_of, to_image
from .inputs import first, setting_input, setting_inputs
from .presets import checked_name, checked_noun, chosen_preset, preset_inputs, with_preset
from .progress import Reporter
from .schema import Schema, advanced

IF_KNOWN = "if already in bank"
KEEP, AGAIN, REFINE = "keep it", "learn it again", "refine it"
OF_TRAINING = ("steps", "batch_size", "resolution", "seed")      # inputs that are fields of TrainingConfig
ADVANCED = ("kind", "method", "steps", "lr", "token_lr", "resolution", "batch_size", "seed", "preview_every",
            "if_known", "stop_after", "show_older")
# inputs that saved graphs may lack
LATER = {"clip_vision": None, "stop_after": 0, "show_older": False, "preset": AS_SET, "effort": NORMAL}


class ConceptLearner(io.ComfyNode):
    """Learns a new concept on top of a bank."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptLearner",
            display_name="Concept Learner",
            category=types.EVERYDAY,
            is_input_list=True,
            search_aliases=["train lora", "dreambooth", "textual inversion", "continual learning", "CIDM",
                            "teach"],
            description="Learns one concept (your dog, your painter's style) from a few photos and adds it "
                        "to a bank. The stored concepts stay the same, bit for bit, and so does the model.",
            inputs=advanced(ADVANCED, [
                io.Model.Input("model", tooltip="The checkpoint to learn on; it is not changed."),
                io.Clip.Input("clip", tooltip="From the same checkpoint."),
                io.Vae.Input("vae", tooltip="From the same checkpoint; it encodes the photos."),
                io.Image.Input("images",
                               tooltip="3 to 10 photos of the concept: a batch, or a list of any sizes."),
                io.String.Input("name", default="",
                                tooltip="What you type in prompts as <name>: letters, digits, - and _."),
                io.String.Input("class_noun", default="",
                                tooltip="What it is, in a word the model knows: dog, teddy bear, painting."),
                io.Combo.Input("kind", options=list(KINDS), default="object",
                               tooltip="object: a thing. style: how pictures look."),
                io.Combo.Input(
                    "method",
                    options=[DEFAULT, *sorted(set(METHODS) - {DEFAULT})],
                    default=DEFAULT,
                    tooltip="\n".join(f"{name}: {entry.summary}" for name, entry in sorted(METHODS.items())),
                ),
                setting_input(TrainingConfig, "steps"),
                io.Float.Input("lr", display_name="learning rate (lr)", default=0.0, min=0.0, max=1.0,
                               step=1e-5, round=1e-7,
                               tooltip="Learning rate of the weights; 0 = the method's own."),
                io.Float.Input("token_lr", display_name="word learning rate (token_lr)", default=0.0, min=0.0,
                               max=1.0, step=1e-4, round=1e-7,
                               tooltip="Learning rate of the words; 0 = the method's own."),
                *setting_inputs(TrainingConfig, ("resolution", "batch_size", "seed")),
                io.Int.Input("preview_every", default=100, min=0, max=10_000,
                             tooltip="Steps between previews; 0 = none."),
                io.Combo.Input(
                    "if_known",
                    display_name=IF_KNOWN,
                    options=[KEEP, AGAIN, REFINE],
                    default=KEEP,
                    tooltip="If the bank already holds this name: keep the concept if it was learned from "
                            "these photos and settings (otherwise an error), or replace it, or refine it: go "
                            "on from what it has learned, with further photos.",
                ),
                types.Bank.Input("bank", optional=True,
                                 tooltip="The bank to add it to; not connected = a new one."),
                io.String.Input(
                    "captions",
                    optional=True,
                    default="",
                    multiline=True,
                    tooltip="One line per photo (an empty line = no caption), or one line for all. Empty = "
                            "'a photo of <name>'.",
                ),
                io.Mask.Input("masks", optional=True,
                              tooltip="White where the concept is, one per photo, same size."),
                io.Image.Input("prior_images", optional=True,
                               tooltip="Other pictures of the class, so that it keeps its meaning."),
                types.Selection.Input("selection", optional=True,
                                      tooltip="From Select Concept Neurons; for methods that use one (cns)."),
                types.Settings.Input("method_settings", optional=True,
                                     tooltip="From the method's own settings node; none = its defaults."),
                types.Settings.Input("training_settings", optional=True,
                                     tooltip="From Concept Training Settings; none = its defaults."),
                io.ClipVision.Input(
                    "clip_vision", optional=True,
                    tooltip="Shows the similarity of every preview to your photos. Without it, the encoder "
                            "for photos is used if it is installed. The method l2dm also uses it.",
                ),
                io.Int.Input(
                    "stop_after",
                    optional=True,
                    default=0,
                    min=0,
                    max=100,
                    tooltip="Stop after this many previews without a gain in similarity to the photos; 0 = "
                            "do all steps. Needs preview_every, and clip_vision or the encoder for photos.",
                ),
                io.Boolean.Input(
                    "show_older",
                    display_name="draw older concepts",
                    optional=True,
                    default=False,
                    tooltip="Draw up to eight older concepts of the bank at the end, beside their thumbnails "
                            "from when they were learned.",
                ),
                *preset_inputs(),
            ]),
            outputs=[
                types.Bank.Output(display_name="bank"),
                io.Image.Output(display_name="loss picture"),
                io.Image.Output(display_name="previews"),
                io.Image.Output(display_name="older concepts"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, name, class_noun, if_known=None):
        """Reports a missing or wrong name, or a folder that cannot be written, before the graph runs. Text
        from another node is None at this point."""
        try:
            if first(name) is not None:
                checked_name(first(name))
            if first(class_noun) is not None:
                checked_noun(first(class_noun), first(if_known) == REFINE)
            check_output_folder(checkpoint_folder())
        except ConceptError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, images, captions=None, bank=None, masks=None, prior_images=None, selection=None,
        method_settings=None, training_settings=None, **inputs
    ) -> io.NodeOutput:
        given = {key: first(value) for key, value in (LATER | inputs).items()}
        name = checked_name(given["name"])
        noun = checked_noun(given["class_noun"], given["if_known"] == REFINE)
        if given["if_known"] not in (KEEP, AGAIN, REFINE):
            raise ConceptError(f"'{IF_KNOWN}' is {given['if_known']!r}; allowed: {KEEP}, {AGAIN}, {REFINE}")
        known = None
        if given["if_known"] == REFINE:
            own = {} if given["preset"] != AS_SET else {"kind": given["kind"], "method": given["method"]}
            known = check_refinable(first(bank), name, class_noun=noun, **own)
        chosen = chosen_preset(given, known)
        given = given if chosen is None else with_preset(given, chosen, known)
        photos = pair_pictures(deferred_pictures(images, "images"), captions or [], masks_of(masks, "masks"))
        prior = [Picture(p, prior_caption(noun), is_prior=True)
                 for p in deferred_pictures(prior_images, "prior_images")]
        settings = _method_settings(given, first(method_settings))
        method = make(given["method"], settings if known is None else settings_of(known, settings))
        if first(selection) is not None:
            method.use_selection(first(selection))
        config = _training_config(given, first(training_settings), chosen)
        with torch.inference_mode(False):
            backbone = ComfyBackbone(given["model"], given["clip"], given["vae"])
            given["encode"] = judge(given["clip_vision"], backbone.layout)
            config = _with_early_stopping(config, given)
            config.check_schedule(backbone.schedule)
            start = ConceptBank(backbone.layout) if first(bank) is None else first(bank)
            start.check_fits(backbone.layout)
            task = Task(name, noun, backbone, start.remove(name) if name in start else start, given["kind"],
                        generator=torch.Generator().manual_seed(config.seed))
            if known is not None:
                if knows_all(known, photos):
                    return _unchanged(start, f"<{name}> was learned from these photos already")
                task = replace(task, words=known.words, refined=start)
            if name in start and given["if_known"] == KEEP:
                return _already_learned(start, _info(task, method), method, config, photos)
            return _learn(task, method, config, [*photos, *prior], given,
                          getattr(cls.hidden, "unique_id", None), chosen)


def _method_settings(given: dict, settings: dict | None) -> dict:
    """The method's settings. Learning rates of the learner that are not 0 replace those that the method has.
    """
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
    return ConceptInfo(task.name, task.class_noun, method.name, words, task.kind)


def _already_learned(bank: ConceptBank, info: ConceptInfo, method: Method, config: TrainingConfig,
                     photos: list[Picture]) -> io.NodeOutput:
    """Returns the bank unchanged if its concept was learned from these photos and settings, as when a saved
    graph runs again. info: what would be learned now.
    """
    name = info.name
    check_known(bank.infos[name], info, method, config, [photo.digest for photo in photos],
                f"set '{IF_KNOWN}' to '{AGAIN}'")
    return _unchanged(bank, f"<{name}> is in the bank already, learned from these photos")


def _unchanged(bank: ConceptBank, sentence: str) -> io.NodeOutput:
    picture = to_tensor(loss_picture([], "the concept is known already"))
    return io.NodeOutput(bank, picture, picture, _no_older_concepts(), ui=ui.PreviewText(sentence))


def _learn(task: Task, method: Method, config: TrainingConfig, pictures: list[Picture], given: dict,
           node: str | None, chosen: Preset | None) -> io.NodeOutput:
    photos = [picture for picture in pictures if not picture.is_prior]
    digests = [photo.digest for photo in photos]
    info = _info(task, method)
    on_captions = check_captions(photos, [*task.bank.infos.values(), info], info)
    taken = report_of(photos, config.resolution).checked(config.resolution, config.framing != "buckets",
                                                         task.bank.infos, task.name)
    warnings = [*taken.warnings, *on_captions,
                *(prior_warnings(method.composition_of_kind(task.kind)) if len(pictures) > len(photos)
                  else [])]
    notes = [*task.backbone.learning_notes, *unusual(method.config), *unusual(config),
             *warnings_before(task.bank, task.name, task.class_noun, method.name, task.kind, digests),
             *([] if task.start is None else notes_on_photos(task.start.info, photos)),
             *(warning.text for warning in warnings)]
    for note in notes:      # before the minutes of training
        logging.warning("Concept Learner: %s", note)
    notes[:0] = [taken.headline, *([] if chosen is None else [chosen.describe(method, config)])]
    size = (config.resolution, config.resolution)
    backbone, settings = task.backbone, SampleSettings(steps=15, cfg=5.0, size=size, batch=1)
    cancel = comfy.model_management.throw_exception_if_processing_interrupted
    with backbone.training():
        check_start(task, method)
        pictures = with_replay(task, pictures, config, settings.cfg, before_each=cancel)
        data = prepare(backbone, pictures, task.name, task.class_noun,
                       Framing(config.resolution, config.framing, config.flip))
        encode = given["encode"]
        if given["clip_vision"] is not None:      # what is learned does not depend on what is installed
            task = replace(task, encode=lambda pictures: encode(list(pictures)))
        similarity = None if encode is None else similarity_to([photo.pixels for photo in photos], encode)
        previews = Previews(backbone, concept_prompt(task.name, task.kind), settings, config.seed, similarity)
        report = Reporter(config.steps, given["preview_every"], previews, node)
        file = checkpoint_file(task.name, run_key(run_identity(task, method, data, config)))
        bank, losses = learn_with_previews(task, method, data, config, previews, report, file,
                                           last=given["preview_every"] > 0)
        older = _no_older_concepts()
        if given["show_older"] and len(task.bank):
            rows = older_concepts(backbone, bank, task.bank.names, settings, config.seed, before_each=cancel)
            older = to_tensor(thumbnails_picture(rows, columns=4))
    if len(losses) < config.steps:
        notes.append(f"ended after {len(losses)} of {config.steps} steps: the similarity to the photos no "
                     "longer grew")
    return _shown(bank, losses, previews, older, notes, f"loss of <{task.name}>")


def _shown(bank: ConceptBank, losses: tuple[float, ...], previews: Previews, older: Tensor, notes: list[str],
           title: str) -> io.NodeOutput:
    loss = to_tensor(loss_picture(losses, title, previews.scores))
    strip = to_image(torch.stack(previews.pictures)) if previews.pictures else loss
    shown = ui.PreviewImage(strip[-1:], cls=ConceptLearner).as_dict()
    text = {"text": ("\n".join(notes),)} if notes else {}
    return io.NodeOutput(bank, loss, strip, older, ui={**shown, **text})


def _no_older_concepts() -> Tensor:
    return to_tensor(loss_picture([], "older concepts were not drawn"))


NODES = [ConceptLearner]

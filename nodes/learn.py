"""ConceptLearner."""

from __future__ import annotations

import hashlib
import io as bytes_io
import json
import logging
from dataclasses import fields, replace

import comfy.model_management
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..core.bank.bank import ConceptBank
from ..core.bank.concepts import KINDS
from ..core.bank.tokens import check_name
from ..core.comfy.backbone import ComfyBackbone
from ..core.data.photos import Framing, Picture, pair_pictures, prepare
from ..core.errors import ConceptError
from ..core.evaluation.collisions import warnings_before
from ..core.evaluation.metrics import image_alignment
from ..core.images import loss_picture, spread, thumbnails_picture, to_tensor
from ..core.methods import DEFAULT, METHODS, Task, make
from ..core.sampling.sampling import sample
from ..core.sampling.settings import SampleSettings
from ..core.training.config import TrainingConfig
from ..core.training.loop import learn
from ..core.training.record import is_same_work, run_identity
from . import host, types
from .schema import Schema

KEEP, AGAIN = "keep it", "learn it again"
OLDER = 8      # older concepts that are drawn at the end
LATER = {"clip_vision": None, "stop_after": 0, "show_older": False}      # inputs that saved graphs may lack


class ConceptLearner(io.ComfyNode):
    """Teaches the next concept on top of a bank."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptLearner",
            display_name="Concept Learner",
            category=types.LEARNING,
            is_input_list=True,
            search_aliases=["train lora", "dreambooth", "textual inversion", "continual learning", "CIDM", "teach"],
            description="Learns one concept (your dog, your painter's style) from a few photos and adds it to a bank. What the bank knows "
            "already stays bit for bit the same; the model that comes in is not changed.",
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint to learn on; it is not changed."),
                io.Clip.Input("clip", tooltip="The same checkpoint's."),
                io.Vae.Input("vae", tooltip="The same checkpoint's; it encodes the photos."),
                io.Image.Input("images", tooltip="3 to 10 photos of the concept: a batch, or a list of any sizes."),
                io.String.Input("name", default="rex", tooltip="What you will type in prompts between < and >. Letters, digits, - and _."),
                io.String.Input("class_noun", default="dog", tooltip="What it is, in a word the model knows: dog, teddy bear, painting."),
                io.Combo.Input("kind", options=list(KINDS), default="object", tooltip="object: a thing. style: how pictures look."),
                io.Combo.Input(
                    "method",
                    options=[DEFAULT, *sorted(set(METHODS) - {DEFAULT})],
                    default=DEFAULT,
                    tooltip="\n".join(f"{name}: {entry.summary}" for name, entry in sorted(METHODS.items())),
                ),
                io.Int.Input("steps", default=800, min=1, max=100_000, tooltip="Optimiser steps. CIDM's paper: 800."),
                io.Float.Input(
                    "lr",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=1e-5,
                    round=1e-7,
                    tooltip="Learning rate of the weights; 0 = the method's own.",
                ),
                io.Float.Input(
                    "token_lr",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=1e-4,
                    round=1e-7,
                    tooltip="Learning rate of the words; 0 = the method's own.",
                ),
                io.Int.Input("resolution", default=512, min=16, max=2048, step=8, tooltip="Side of the training pictures in pixels."),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Photos per step. More is steadier and slower."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFF, tooltip="Same seed, same result."),
                io.Int.Input("preview_every", default=100, min=0, max=10_000, tooltip="Steps between live samples; 0 = none."),
                io.Combo.Input(
                    "if_known",
                    options=[KEEP, AGAIN],
                    default=KEEP,
                    tooltip="When the bank already holds this name: keep the concept when it was learned from these photos and "
                    "settings (else it is an error), or replace it.",
                ),
                types.Bank.Input("bank", optional=True, tooltip="The bank to grow; nothing connected = a new one."),
                io.String.Input(
                    "captions",
                    optional=True,
                    default="",
                    multiline=True,
                    tooltip="One line per photo, or one line for all. Empty = 'a photo of <name>'.",
                ),
                io.Mask.Input("masks", optional=True, tooltip="White where the concept is, one per photo, same size."),
                io.Image.Input("prior_images", optional=True, tooltip="Other pictures of the class, so that it keeps its meaning."),
                types.Selection.Input("selection", optional=True, tooltip="From Concept Neuron Select; for methods that use one (cns)."),
                types.Settings.Input("method_settings", optional=True, tooltip="From the method's own settings node; none = its defaults."),
                types.Settings.Input("training_settings", optional=True, tooltip="From Concept Training Settings; none = its defaults."),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="With it every live sample is compared with your photos: how like them it is."
                ),
                io.Int.Input(
                    "stop_after",
                    optional=True,
                    default=0,
                    min=0,
                    max=100,
                    tooltip="Stop early when so many live samples in a row are no more like the photos than those before; "
                    "0 = do all steps. Needs clip_vision and preview_every.",
                ),
                io.Boolean.Input(
                    "show_older",
                    optional=True,
                    default=False,
                    tooltip="At the end also draw older concepts of the bank, up to eight, beside their pictures from when they were new.",
                ),
            ],
            outputs=[
                types.Bank.Output(display_name="bank"),
                io.Image.Output(display_name="loss"),
                io.Image.Output(display_name="previews"),
                io.Image.Output(display_name="older"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, captions=None, bank=None, masks=None, prior_images=None, selection=None, method_settings=None, training_settings=None, **inputs
    ) -> io.NodeOutput:
        inputs = LATER | inputs
        one = {key: host.first(value) for key, value in inputs.items() if key != "images"}
        name, noun = check_name(one["name"].strip().strip("<>")), one["class_noun"].strip()
        if one["if_known"] not in (KEEP, AGAIN):
            raise ConceptError(f"if_known is {one['if_known']!r}; allowed: {KEEP}, {AGAIN}")
        lines = [line for text in captions or [] for line in text.splitlines() if line.strip()]
        own = pair_pictures(host.pictures_of(inputs["images"], "images"), lines, host.masks_of(masks, "masks"))
        prior = [Picture(p, f"a photo of a {noun}", is_prior=True) for p in host.pictures_of(prior_images, "prior_images")]
        method = make(one["method"], _method_settings(one, host.first(method_settings)))
        if host.first(selection) is not None:
            method.selection = host.first(selection)
        config = _stopping(_training(one, host.first(training_settings)), one)
        known = host.first(bank)
        with torch.inference_mode(False):
            backbone = ComfyBackbone(one["model"], one["clip"], one["vae"])
            known = ConceptBank(backbone.layout) if known is None else known
            known.check_fits(backbone.layout)
            if name in known:
                if one["if_known"] == AGAIN:
                    known = known.remove(name)
                else:
                    return _kept(known, name, method, config, own)
            task = Task(name, noun, backbone, known, one["kind"], generator=torch.Generator().manual_seed(config.seed))
            return _learn(task, method, config, [*own, *prior], one, getattr(cls.hidden, "unique_id", None))


def _method_settings(one: dict, more: dict | None) -> dict:
    given = dict(more or {})
    known = {field.name for field in fields(METHODS[one["method"]].config)} if one["method"] in METHODS else set()
    return given | {key: one[key] for key in ("lr", "token_lr") if one[key] > 0 and key in known}


def _training(one: dict, more: dict | None) -> TrainingConfig:
    unknown = sorted(set(more or {}) - {field.name for field in fields(TrainingConfig)})
    if unknown:
        raise ConceptError(f"training_settings holds {unknown[0]!r}, which is no setting of training; connect Concept Training Settings")
    base = TrainingConfig(steps=one["steps"], batch_size=one["batch_size"], resolution=one["resolution"], seed=one["seed"])
    return replace(base, **(more or {}))


def _stopping(config: TrainingConfig, one: dict) -> TrainingConfig:
    """Looks count for the run's identity only where they can end it: showing samples or not changes nothing."""
    after, every = one["stop_after"], one["preview_every"]
    if after and (one["clip_vision"] is None or not every):
        lacks = "clip_vision is not connected" if one["clip_vision"] is None else "preview_every is 0"
        raise ConceptError(f"stop_after is {after} but {lacks}; live samples are what tells when to stop; allowed without: 0")
    return replace(config, patience=after, look_every=every) if after else config


def _kept(bank: ConceptBank, name: str, method, config: TrainingConfig, own: list[Picture]) -> io.NodeOutput:
    """The bank holds the concept already: fine when it is the same work, which a second run of a saved graph is."""
    origin = bank.infos[name].provenance
    same = is_same_work(origin, method, config) and list(origin.images) == [p.digest for p in own]
    if bank.infos[name].method != method.name or not same:
        raise ConceptError(
            f"the bank already holds a concept '{name}', learned from other photos or settings; choose another name, or "
            f"set if_known to '{AGAIN}'"
        )
    picture = to_tensor(loss_picture([], f"<{name}> is known already"))
    return io.NodeOutput(
        bank, picture, picture, _nothing_older(), ui=ui.PreviewText(f"<{name}> is in the bank already, learned from these photos")
    )


def _learn(task: Task, method, config: TrainingConfig, pictures: list[Picture], one: dict, node: str | None) -> io.NodeOutput:
    backbone, every = task.backbone, one["preview_every"]
    notes = list(warnings_before(task.bank, task.name, task.class_noun, method.name))
    for note in notes:      # before the minutes that learning takes
        logging.warning("Concept Learner: %s", note)
    look = SampleSettings(steps=15, cfg=5.0, size=(config.resolution, config.resolution), batch=1)
    with backbone.training():
        data = prepare(backbone, pictures, task.name, task.class_noun, Framing(config.resolution, config.framing, config.flip))
        key = hashlib.sha256(json.dumps(run_identity(task, method, data, config), sort_keys=True).encode()).hexdigest()[:12]
        alike = _likeness(one["clip_vision"], pictures)
        report = host.Reporter(config.steps, backbone, _prompt(task.name, task.kind), every, look, config.seed, alike, node)
        judge = report.judge if config.patience else None
        learned = learn(task, method, data, config, report, host.checkpoint_file(task.name, key), evaluator=judge)
        bank = learned.bank
        if every:
            if report.looked != len(learned.losses):      # the look that ended learning is the last one
                report.look(bank, len(learned.losses))
            bank = task.bank.add(replace(learned.concept, thumbnail=_jpeg(report.previews[-1])), learned.bank.shared)
        older = _older(backbone, bank, task.bank.names, look, config.seed) if one["show_older"] else _nothing_older()
    loss = to_tensor(loss_picture(learned.losses, f"loss of <{task.name}>", report.scores))
    previews = torch.cat(report.previews) if report.previews else loss
    if len(learned.losses) < config.steps:
        notes.append(f"ended after {len(learned.losses)} of {config.steps} steps: it was no longer getting more like the photos")
    shown = ui.PreviewImage(previews[-1:], cls=ConceptLearner).as_dict()
    return io.NodeOutput(bank, loss, previews, older, ui={**shown, **({"text": ("\n".join(notes),)} if notes else {})})


def _prompt(name: str, kind: str) -> str:
    return f"a photo of <{name}>" if kind == "object" else f"<{name}>"


def _likeness(clip_vision, pictures: list[Picture]):
    """Samples -> image alignment with the concept's own photos; None without a CLIP_VISION."""
    if clip_vision is None:
        return None
    encode = host.vision(clip_vision)
    real = encode([picture.pixels for picture in pictures if not picture.is_prior])
    return lambda samples: image_alignment(encode(list(samples)), real)


def _older(backbone, bank: ConceptBank, names: list[str], look: SampleSettings, seed: int) -> torch.Tensor:
    """Older concepts as the new bank draws them, beside their thumbnails."""
    rows = []
    for name in spread(names, OLDER):
        comfy.model_management.throw_exception_if_processing_interrupted()
        info = bank.infos[name]
        picture = host.to_image(sample(backbone, bank, [_prompt(name, info.kind)], [seed], look))
        rows += [(f"<{name}> when learned", bank[name].thumbnail), (f"<{name}> now", _jpeg(picture))]
    return to_tensor(thumbnails_picture(rows, columns=4)) if rows else _nothing_older()


def _nothing_older() -> torch.Tensor:
    return to_tensor(loss_picture([], "older concepts were not drawn"))


def _jpeg(image: torch.Tensor) -> bytes:
    picture = Image.fromarray((image[0] * 255).round().byte().numpy())
    picture.thumbnail((256, 256))
    buffer = bytes_io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


NODES = [ConceptLearner]

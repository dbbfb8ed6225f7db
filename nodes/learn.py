"""ConceptLearner and its optional settings."""

from __future__ import annotations

import hashlib
import io as bytes_io
import json
from dataclasses import asdict, fields, replace

import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..core.bank import ConceptBank
from ..core.concepts import KINDS
from ..core.errors import ConceptError
from ..core.hosts.comfy.backbone import ComfyBackbone
from ..core.methods.base import METHODS, Task, make
from ..core.pictures import loss_picture, to_tensor
from ..core.sampling import SampleSettings
from ..core.tokens import check_name
from ..core.training.config import LR_SCHEDULES, PRECISIONS, TrainingConfig
from ..core.training.data import Framing, Picture, prepare
from ..core.training.loop import learn, method_settings, run_identity
from . import host, types
from .schema import Schema

KEEP, AGAIN = "keep it", "learn it again"


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
                io.Model.Input("model"),
                io.Clip.Input("clip"),
                io.Vae.Input("vae"),
                io.Image.Input("images", tooltip="3 to 10 photos of the concept: a batch, or a list of any sizes."),
                io.String.Input("name", default="rex", tooltip="What you will type in prompts between < and >. Letters, digits, - and _."),
                io.String.Input("class_noun", default="dog", tooltip="What it is, in a word the model knows: dog, teddy bear, painting."),
                io.Combo.Input("kind", options=list(KINDS), default="object", tooltip="object: a thing. style: how pictures look."),
                io.Combo.Input(
                    "method",
                    options=sorted(METHODS),
                    default="cidm",
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
                types.Settings.Input("method_settings", optional=True),
                types.Settings.Input("training_settings", optional=True),
            ],
            outputs=[
                types.Bank.Output(display_name="bank"),
                io.Image.Output(display_name="loss"),
                io.Image.Output(display_name="previews"),
            ],
        )

    @classmethod
    def execute(
        cls, captions=None, bank=None, masks=None, prior_images=None, selection=None, method_settings=None, training_settings=None, **inputs
    ) -> io.NodeOutput:
        one = {key: host.first(value) for key, value in inputs.items() if key != "images"}
        name, noun = check_name(one["name"].strip().strip("<>")), one["class_noun"].strip()
        if one["if_known"] not in (KEEP, AGAIN):
            raise ConceptError(f"if_known is {one['if_known']!r}; allowed: {KEEP}, {AGAIN}")
        lines = [line for text in captions or [] for line in text.splitlines() if line.strip()]
        own = host.with_masks(host.pictures_of(inputs["images"], "images"), lines, host.masks_of(masks, "masks"))
        prior = [Picture(p, f"a photo of a {noun}", is_prior=True) for p in host.pictures_of(prior_images, "prior_images")]
        method = make(one["method"], _method_settings(one, host.first(method_settings)))
        if host.first(selection) is not None:
            method.selection = host.first(selection)
        config = _training(one, host.first(training_settings))
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
            return _learn(task, method, config, [*own, *prior], one["preview_every"])


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


def _kept(bank: ConceptBank, name: str, method, config: TrainingConfig, own: list[Picture]) -> io.NodeOutput:
    """The bank holds the concept already: fine when it is the same work, which a second run of a saved graph is."""
    origin = bank.infos[name].provenance
    wanted = json.loads(json.dumps({"method": method_settings(method), "training": asdict(config)}))
    same = json.loads(json.dumps(dict(origin.settings))) == wanted and list(origin.images) == [p.digest for p in own]
    if not same or bank.infos[name].method != method.name:
        raise ConceptError(
            f"the bank already holds a concept '{name}', learned from other photos or settings; choose another name, or "
            f"set if_known to '{AGAIN}'"
        )
    picture = to_tensor(loss_picture([], f"<{name}> is known already"))
    return io.NodeOutput(bank, picture, picture, ui=ui.PreviewText(f"<{name}> is in the bank already, learned from these photos"))


def _learn(task: Task, method, config: TrainingConfig, pictures: list[Picture], every: int) -> io.NodeOutput:
    backbone = task.backbone
    prompt = f"a photo of <{task.name}>" if task.kind == "object" else f"<{task.name}>"
    look = SampleSettings(steps=15, cfg=5.0, size=(config.resolution, config.resolution))
    with backbone.training():
        data = prepare(backbone, pictures, task.name, task.class_noun, Framing(config.resolution, config.framing, config.flip))
        key = hashlib.sha256(json.dumps(run_identity(task, method, data, config), sort_keys=True).encode()).hexdigest()[:12]
        report = host.Reporter(config.steps, backbone, prompt, every, look, config.seed)
        learned = learn(task, method, data, config, report, host.checkpoint_file(task.name, key))
        bank = learned.bank
        if every:
            report.look(bank)
            bank = task.bank.add(replace(learned.concept, cover=_jpeg(report.previews[-1])), learned.bank.shared)
    loss = to_tensor(loss_picture(learned.losses, f"loss of <{task.name}>"))
    previews = torch.cat(report.previews) if report.previews else loss
    return io.NodeOutput(bank, loss, previews, ui=ui.PreviewImage(previews[-1:], cls=ConceptLearner))


def _jpeg(image: torch.Tensor) -> bytes:
    picture = Image.fromarray((image[0] * 255).round().byte().numpy())
    picture.thumbnail((256, 256))
    buffer = bytes_io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


class ConceptTrainingSettings(io.ComfyNode):
    """What most people never need to touch about training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptTrainingSettings",
            display_name="Concept Training Settings",
            category=types.LEARNING,
            description="Optional settings of the training loop, for Concept Learner's training_settings.",
            inputs=[
                io.Combo.Input("optimizer", options=["AdamW", "Adam", "SGD", "Adafactor", "NAdam", "RAdam"], default="AdamW"),
                io.Combo.Input("schedule", options=list(LR_SCHEDULES), default="linear", tooltip="Of the learning rates."),
                io.Int.Input("warmup", default=0, min=0, max=10_000, tooltip="Steps until the full rate; 0 = none."),
                io.Float.Input("max_grad_norm", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="0 = no clipping."),
                io.Float.Input("min_snr_gamma", default=0.0, min=0.0, max=20.0, step=0.5, tooltip="0 = off; 5 is usual."),
                io.Float.Input("noise_offset", default=0.0, min=0.0, max=1.0, step=0.01, tooltip="0 = off; CIDM's code uses 0.01."),
                io.Int.Input("accumulation", default=1, min=1, max=64, tooltip="Forward passes per step; 1 = none."),
                io.Boolean.Input("gradient_checkpointing", default=False, tooltip="Less memory, about a third more time."),
                io.Combo.Input("precision", options=list(PRECISIONS), default="float32", tooltip="Of the base's arithmetic in training."),
                io.Combo.Input(
                    "framing", options=["crop", "pad"], default="crop", tooltip="crop fills the square; pad shows the whole photo."
                ),
                io.Boolean.Input("flip", default=True, tooltip="Also learn from mirrored photos. Off for text and asymmetric things."),
                io.Float.Input("prior_weight", default=1.0, min=0.0, max=10.0, step=0.1, tooltip="Of prior pictures; 0 = ignore them."),
                io.Float.Input("caption_dropout", default=0.0, min=0.0, max=0.9, step=0.05, tooltip="Share of empty captions; 0 = none."),
                io.Int.Input(
                    "checkpoint_every",
                    default=100,
                    min=0,
                    max=10_000,
                    tooltip="Steps between safety copies of the run; 0 = only when it is cancelled or fails.",
                ),
            ],
            outputs=[types.Settings.Output(display_name="training_settings")],
        )

    @classmethod
    def execute(cls, **settings) -> io.NodeOutput:
        replace(TrainingConfig(), **settings)  # says what is wrong here, not in the learner
        return io.NodeOutput(settings)


class CIDMSettings(io.ComfyNode):
    """The settings of CIDM (methods/cidm.py)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="CIDMSettings",
            display_name="CIDM Settings",
            category=types.LEARNING,
            description="Optional settings of the method CIDM, for Concept Learner's method_settings. The defaults are the paper's.",
            inputs=[
                io.Int.Input("rank", default=4, min=1, max=128, tooltip="Rank of the deltas. Paper: 4."),
                io.Float.Input("scale", default=1.0, min=0.01, max=16.0, step=0.05, tooltip="Factor on the deltas; 1 = none."),
                io.Boolean.Input(
                    "layerwise", default=True, tooltip="A word for every layer (the paper's), or one for all (exports as embedding)."
                ),
                io.Float.Input("gamma1", default=0.1, min=0.0, max=100.0, step=0.01, tooltip="Task-specific loss R1; 0 = off. Paper: 0.1."),
                io.Float.Input("gamma2", default=1.0, min=0.0, max=100.0, step=0.1, tooltip="Task-shared loss R2; 0 = off. Paper: 1."),
                io.Combo.Input(
                    "orthogonality", options=["rr", "aa", "off"], default="rr", tooltip="Reading of R1: r x r (ours), a x a (printed)."
                ),
                io.Combo.Input(
                    "shared", options=["als", "gradient", "off"], default="als", tooltip="W* and H: solved, or the paper's step."
                ),
                io.Int.Input("shared_rank", default=8, min=1, max=256, tooltip="Rank of the common subspace W*."),
                io.Float.Input("attention_weight", default=0.01, min=0.0, max=10.0, step=0.01, tooltip="Attention regulariser; 0 = off."),
                io.Float.Input(
                    "token_norm_stop",
                    default=1.4,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Words stop learning at this many times the class noun's length; 0 = never.",
                ),
            ],
            outputs=[types.Settings.Output(display_name="method_settings")],
        )

    @classmethod
    def execute(cls, **settings) -> io.NodeOutput:
        make("cidm", settings)
        return io.NodeOutput(settings)


NODES = [ConceptLearner, ConceptTrainingSettings, CIDMSettings]

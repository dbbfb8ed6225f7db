"""Concept Neuron Select: which weights a concept lives in."""

from __future__ import annotations

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui

from ..core.charts import selection_picture
from ..core.comfy.backbone import ComfyBackbone
from ..core.data.framing import Framing, Picture
from ..core.data.training_set import prepare
from ..core.errors import ConceptError
from ..core.images import to_tensor
from ..core.neurons.neurons import UNITS, concept_neurons
from ..core.neurons.scores import (
    CALIBRATION,
    SCORES,
    activation_scores,
    encode_plain,
    general_neurons,
    gradient_scores,
    text_positions,
)
from . import types
from .images import pictures_of
from .inputs import first, lines_of
from .schema import Schema


class ConceptNeuronSelect(io.ComfyNode):
    """CNS's concept neurons: what answers to the concept, without what answers to everything."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptNeuronSelect",
            display_name="Concept Neuron Select",
            category=types.LEARNING,
            is_input_list=True,
            search_aliases=["CNS", "mask weights", "explain concept", "neurons"],
            description="Finds the key and value weights that a concept depends on and that unrelated prompts do not. For Concept Learner "
            "(method cns); alone it shows where in the model a concept lives.",
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint whose neurons are scored; it is not changed."),
                io.Clip.Input("clip", tooltip="The same checkpoint's."),
                io.String.Input("prompt", default="a photo of a dog", tooltip="The concept in plain words. No placeholders."),
                io.Combo.Input(
                    "score",
                    options=list(SCORES),
                    default="gradient",
                    tooltip="gradient: sees photos, costs backward passes. activation: text alone, seconds.",
                ),
                io.Float.Input(
                    "share",
                    default=0.058,
                    min=0.0001,
                    max=1.0,
                    step=0.001,
                    round=0.0001,
                    tooltip="Of the key and value weights; 0.058 is 0.13 % of SD1.5's UNet, the paper's figure.",
                ),
                io.Combo.Input("unit", options=list(UNITS), default="weight", tooltip="Single weights, or whole rows of them."),
                io.Int.Input("draws", default=64, min=1, max=10_000, tooltip="Noise levels per photo set for the gradient score."),
                io.Float.Input("quorum", default=0.5, min=0.01, max=1.0, step=0.05, tooltip="Share of prompts that makes one general."),
                io.Int.Input("resolution", default=512, min=16, max=2048, step=8, tooltip="Side of the photos in pixels."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFF, tooltip="Of the noise that the scores look through."),
                io.Vae.Input("vae", optional=True, tooltip="Needed with images."),
                io.Image.Input("images", optional=True, tooltip="Photos of the concept; needed for the gradient score."),
                io.String.Input(
                    "calibration_prompts",
                    optional=True,
                    multiline=True,
                    default="",
                    tooltip=f"Unrelated prompts, a line each; empty = {len(CALIBRATION)} built-in ones.",
                ),
            ],
            outputs=[
                types.Selection.Output(display_name="selection"),
                io.Image.Output(display_name="where"),
                io.Float.Output(display_name="share_of_unet"),
            ],
        )

    @classmethod
    def execute(cls, images=None, vae=None, calibration_prompts=None, **inputs) -> io.NodeOutput:
        one = {key: first(value) for key, value in inputs.items()}
        photos = pictures_of(images, "images")
        if one["score"] == "gradient" and not photos:
            raise ConceptError("the gradient score needs photos; connect images and vae, or choose the score 'activation'")
        backbone = ComfyBackbone(one["model"], one["clip"], first(vae))
        with backbone.training():
            chosen = _select(backbone, one, photos, tuple(lines_of(calibration_prompts)) or CALIBRATION)
        parameters = sum(p.numel() for p in backbone.unet.parameters())
        share = chosen.share(parameters)
        picture = to_tensor(selection_picture(chosen, len(backbone.layout), f"concept neurons of '{one['prompt']}'", share))
        return io.NodeOutput(chosen, picture, share, ui=ui.PreviewImage(picture, cls=cls))


def _select(backbone: ComfyBackbone, one: dict, photos: list, prompts: tuple[str, ...]):
    generator = torch.Generator().manual_seed(one["seed"])
    context = encode_plain(backbone, [one["prompt"]])
    bar = comfy.utils.ProgressBar(len(prompts) + one["draws"])

    def progress(done: int, _total: int, before: int = 0) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(before + done)

    size = (one["resolution"] // backbone.picture_multiple,) * 2
    rule = {"unit": one["unit"], "quorum": one["quorum"]}
    general = general_neurons(backbone, generator, prompts, one["score"], size=size, progress=progress, **rule)
    if one["score"] == "activation":
        scores = activation_scores(backbone, context, text_positions(backbone, [one["prompt"]]))
    else:
        data = prepare(backbone, [Picture(p) for p in photos], "concept", "", Framing(one["resolution"], flip=False))
        later = len(prompts)
        scores = gradient_scores(
            backbone, data.latents, context, generator, one["draws"], progress=lambda done, total: progress(done, total, later)
        )
    return concept_neurons(scores, general, one["share"], one["unit"])


NODES = [ConceptNeuronSelect]

"""The node Select Concept Neurons: selects the weights that a concept depends on."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..core.charts import selection_picture
from ..core.comfy.backbone import ComfyBackbone
from ..core.data.framing import Framing
from ..core.data.pictures import Picture
from ..core.data.training_set import prepare
from ..core.errors import ConceptError
from ..core.images import to_tensor
from ..core.neurons.neurons import UNITS, NeuronSelection, concept_neurons
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
from .schema import Schema, advanced


class ConceptNeuronSelect(io.ComfyNode):
    """Selects CNS's concept neurons, which respond to the concept but not to unrelated prompts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptNeuronSelect",
            display_name="Select Concept Neurons",
            category=types.ADVANCED,
            is_input_list=True,
            search_aliases=["Concept Neuron Select", "CNS", "mask weights", "explain concept", "neurons"],
            description="Finds the key and value weights on which a concept depends and unrelated prompts "
                        "do not. Concept Learner uses them (method cns). On its own, the node shows where "
                        "in the model they are.",
            inputs=advanced(("unit", "draws", "quorum", "seed", "calibration_prompts"), [
                io.Model.Input("model",
                               tooltip="The checkpoint whose neurons are scored; it is not changed."),
                io.Clip.Input("clip", tooltip="From the same checkpoint."),
                io.String.Input("prompt", default="a photo of a dog",
                                tooltip="The concept in plain words. No placeholders."),
                io.Combo.Input(
                    "score",
                    options=list(SCORES),
                    default="gradient",
                    tooltip="gradient: uses photos and backward passes. activation: uses text only and takes "
                            "seconds.",
                ),
                io.Float.Input(
                    "share",
                    default=0.058,
                    min=0.0001,
                    max=1.0,
                    step=0.001,
                    round=0.0001,
                    tooltip="Share of the key and value weights; 0.058 is 0.13 % of SD1.5's UNet, the "
                            "paper's figure.",
                ),
                io.Combo.Input("unit", options=list(UNITS), default="weight",
                               tooltip="Single weights, or whole rows of them."),
                io.Int.Input("draws", default=64, min=1, max=10_000,
                             tooltip="How many noise levels the gradient score averages over."),
                io.Float.Input("quorum", default=0.5, min=0.01, max=1.0, step=0.05,
                               tooltip="A neuron that responds to this share of the unrelated prompts counts "
                                       "as general."),
                io.Int.Input("resolution", default=512, min=16, max=2048, step=8,
                             tooltip="Side of the photos in pixels."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFF,
                             tooltip="Seed of the noise for the scores."),
                io.Vae.Input("vae", optional=True, tooltip="Needed with images."),
                io.Image.Input("images", optional=True,
                               tooltip="Photos of the concept; needed for the gradient score."),
                io.String.Input(
                    "calibration_prompts",
                    optional=True,
                    multiline=True,
                    default="",
                    tooltip=f"Unrelated prompts, a line each; empty = {len(CALIBRATION)} built-in ones.",
                ),
            ]),
            outputs=[
                types.Selection.Output(display_name="selection"),
                io.Image.Output(display_name="where they lie"),
                io.Float.Output(display_name="share of the model"),
            ],
        )

    @classmethod
    def execute(cls, images=None, vae=None, calibration_prompts=None, **inputs) -> io.NodeOutput:
        given = {key: first(value) for key, value in inputs.items()}
        photos = pictures_of(images, "images")
        if given["score"] == "gradient" and not photos:
            raise ConceptError("the gradient score needs photos; connect images and vae, or choose the score "
                               "'activation'")
        backbone = ComfyBackbone(given["model"], given["clip"], first(vae))
        backbone.layout.refuse_joint("concept neurons are")
        with backbone.training():
            prompts = tuple(lines_of(calibration_prompts)) or CALIBRATION
            selection = _select(backbone, given, photos, prompts)
        share = selection.share(backbone.parameter_count)
        title = f"concept neurons of '{given['prompt']}'"
        picture = to_tensor(selection_picture(selection, len(backbone.layout), title, share))
        return io.NodeOutput(selection, picture, share, ui=ui.PreviewImage(picture, cls=cls))


def _select(backbone: ComfyBackbone, given: dict, photos: list[Tensor],
            prompts: tuple[str, ...]) -> NeuronSelection:
    """The concept's neurons without the general neurons. The progress bar counts prompts, then draws."""
    generator = torch.Generator().manual_seed(given["seed"])
    context = encode_plain(backbone, [given["prompt"]])
    bar = comfy.utils.ProgressBar(len(prompts) + given["draws"])

    def progress_from(start: int) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(start + done)

        return progress

    side = given["resolution"] // backbone.picture_multiple
    general = general_neurons(backbone, generator, prompts, given["score"], unit=given["unit"],
                              quorum=given["quorum"],
                              size=(side, side), progress=progress_from(0))
    if given["score"] == "activation":
        scores = activation_scores(backbone, context, text_positions(backbone, [given["prompt"]]))
    else:
        pictures = [Picture(photo) for photo in photos]
        data = prepare(backbone, pictures, "concept", "", Framing(given["resolution"], flip=False))
        scores = gradient_scores(backbone, data.latents, context, generator, given["draws"],
                                 progress=progress_from(len(prompts)))
    return concept_neurons(scores, general, given["share"], given["unit"])


NODES = [ConceptNeuronSelect]

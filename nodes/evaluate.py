"""The nodes Concept Reference Photos and Evaluate Concepts, which measure a bank's quality."""

from __future__ import annotations

import json

import comfy.model_management
import comfy.utils
from comfy_api.latest import io, ui
from torch import Tensor

from ..core.bank.hints import notes_on_base
from ..core.bank.tokens import check_name, typed_name
from ..core.comfy.backbone import ComfyBackbone
from ..core.errors import ConceptError
from ..core.evaluation.bankcheck import check_bank, references_of
from ..core.evaluation.photo_encoder import INSTALL
from ..core.evaluation.sheet import lines, sheet
from ..core.images import to_tensor
from ..core.sampling.settings import SampleSettings
from . import types
from .images import judge, pictures_of
from .inputs import first, lines_of
from .progress import bar_preview, written_below
from .schema import Schema, advanced

BATCH = 4      # pictures per UNet call


class ConceptReferencePhotos(io.ComfyNode):
    """Reference photos of one concept. These nodes can be chained."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptReferencePhotos",
            display_name="Concept Reference Photos",
            category=types.EVALUATION,
            is_input_list=True,
            description="Gives real photos of one concept to Evaluate Concepts. Chain several "
                        "through 'photos'.",
            inputs=[
                io.Image.Input("images", tooltip="Photos of the concept: a batch, or a list of any sizes."),
                io.String.Input("concept", default="", placeholder="rex", tooltip="Its name in the bank."),
                types.Photos.Input("photos", optional=True,
                                   tooltip="Photos of the concepts before this one."),
            ],
            outputs=[types.Photos.Output(display_name="photos")],
        )

    @classmethod
    def execute(cls, images, concept, photos=None) -> io.NodeOutput:
        name = check_name(typed_name(first(concept)))
        pictures = pictures_of(images, f"images of '{name}'")
        if not pictures:
            raise ConceptError(f"there are no photos of '{name}'; connect one or more")
        earlier = first(photos) or {}
        return io.NodeOutput({**earlier, name: [*earlier.get(name, []), *pictures]})


class ConceptEvaluate(io.ComfyNode):
    """Samples every concept of a bank and evaluates the pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptEvaluate",
            display_name="Evaluate Concepts",
            category=types.EVALUATION,
            is_output_node=True,
            search_aliases=["Concept Evaluate", "image alignment", "CLIP score", "benchmark", "forgetting",
                            "compare concepts"],
            description="Draws every concept of a bank and measures its similarity to its own photos and "
                        "to those of the other concepts. Also measures whether prompts without concepts "
                        "still give the base's pictures.",
            inputs=advanced(("base_prompts", "seed", "steps", "cfg"), [
                io.Model.Input("model", tooltip="The base, without Apply Concepts."),
                io.Clip.Input("clip", tooltip="From the same checkpoint."),
                io.Vae.Input("vae", tooltip="From the same checkpoint."),
                io.ClipVision.Input("clip_vision", optional=True,
                                    tooltip="Compares the pictures; the papers use CLIP ViT-B/32. Without "
                                            "it, the encoder for photos is used if it is installed."),
                types.Bank.Input("bank", tooltip="The bank to measure; it is not changed."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="a photo of {}\na photo of {} in a forest",
                    tooltip="One prompt per line, with {} for the concept.",
                ),
                io.String.Input(
                    "base_prompts",
                    multiline=True,
                    default="a photo of a dog on a beach",
                    tooltip="Prompts without concepts, one per line. They are drawn with and without the "
                            "bank. Empty = not compared.",
                ),
                io.Int.Input("seeds", display_name="pictures per prompt", default=2, min=1, max=64,
                             tooltip="Pictures per concept and prompt."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFF,
                             tooltip="Seed of the first picture; each further picture adds 1."),
                io.Int.Input("steps", default=20, min=1, max=1000,
                             tooltip="Steps of DPM-Solver++; the papers use 50."),
                io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="Guidance scale; 1 = none."),
                io.Int.Input("size", display_name="picture size", default=512, min=16, max=2048, step=8,
                             tooltip="Side of the pictures in pixels."),
                io.String.Input("concepts", default="", optional=True,
                                tooltip="Names, comma separated; empty = all of the bank."),
                types.Photos.Input("photos", optional=True,
                                   tooltip="From Concept Reference Photos. A concept without photos is "
                                           "compared with its thumbnail."),
            ]),
            outputs=[io.Image.Output(display_name="sheet"), io.String.Output(display_name="figures (JSON)")],
        )

    @classmethod
    def execute(
        cls, model, clip, vae, bank, prompts, base_prompts, seeds, seed, steps, cfg, size, clip_vision=None,
        concepts="", photos=None
    ) -> io.NodeOutput:
        names = _names(bank, concepts)
        encode = judge(clip_vision, bank.layout)
        if encode is None:
            raise ConceptError("clip_vision is not connected; connect Load CLIP Vision or, for an embedded "
                               f"base, the one of its loader; for photos, this also works: {INSTALL}")
        references = references_of(bank, names, photos or {})
        settings = SampleSettings(steps=steps, cfg=cfg, size=(size, size), batch=BATCH)
        bar = comfy.utils.ProgressBar(1)

        def progress(done: int, total: int, picture: Tensor) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, total, bar_preview(picture))

        backbone = ComfyBackbone(model, clip, vae)
        notes = notes_on_base((bank.infos[name] for name in names), backbone.layout, backbone.fingerprint)
        report = check_bank(
            backbone,
            bank,
            references,
            lines_of([prompts]),
            lines_of([base_prompts]),
            encode,
            range(seed, seed + seeds),
            settings,
            progress,
        )
        picture = to_tensor(sheet(report))
        shown = {**ui.PreviewImage(picture, cls=cls).as_dict(), **written_below(notes, [lines(report)])}
        return io.NodeOutput(picture, json.dumps(report.to_json(), indent=1), ui=shown)


def _names(bank, concepts: str) -> list[str]:
    if bank is None or not len(bank):
        raise ConceptError("the bank holds no concept to evaluate; learn one first")
    names = [typed_name(name) for name in concepts.split(",") if name.strip()]
    unknown = [name for name in names if name not in bank]
    if unknown:
        raise ConceptError(f"concepts names '{unknown[0]}', which the bank does not hold; it holds "
                           f"{', '.join(bank.names)}")
    return list(dict.fromkeys(names)) or bank.names


NODES = [ConceptReferencePhotos, ConceptEvaluate]

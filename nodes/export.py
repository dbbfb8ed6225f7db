"""The node Export Concept: exports concepts to files for other programs."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..core.bank.tokens import typed_name
from ..core.errors import ConceptError
from ..core.files import check_output_folder
from ..core.interop.export import export_bank, export_concept
from ..core.interop.prompt_export import export_prompt
from . import types
from .schema import Schema

FORMATS = {
    "LoRA and embedding": ("kohya", "embedding"),
    "LoRA": ("kohya",),
    "embedding": ("embedding",),
    "LoRA with its words inside": ("bundle",),
    "diffusers LoRA": ("diffusers",),
}


def register_folders() -> None:
    """Makes exported words available as `embedding:name`, because ComfyUI does not search its output folder
    for embeddings.
    """
    folder = os.path.join(folder_paths.get_output_directory(), "embeddings")
    folder_paths.add_model_folder_path("embeddings", folder)


class ConceptExport(io.ComfyNode):
    """Exports one concept, all concepts, or the sum of deltas for a prompt, as LoRA and embedding files."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptExport",
            display_name="Export Concept",
            category=types.BANKS,
            is_output_node=True,
            search_aliases=["save lora", "export lora", "embedding"],
            description="Writes one concept, a whole bank, or the concepts of a prompt as files that "
                        "ComfyUI and other programs read, to output/loras and output/embeddings. "
                        "Existing files are never replaced.",
            inputs=[
                types.Bank.Input("bank", tooltip="The bank that holds it."),
                io.String.Input("concept", default="", placeholder="rex",
                                tooltip="Name of a concept in the bank; empty or * = every concept."),
                io.Combo.Input(
                    "format", options=list(FORMATS), default="LoRA and embedding",
                    tooltip="Two files suit most programs; see the help."
                ),
                io.Float.Input("strength", default=1.0, min=-2.0, max=2.0, step=0.05,
                               tooltip="Factor on the deltas; 1 = as learned."),
                io.String.Input(
                    "prompt",
                    optional=True,
                    default="",
                    tooltip="If given, 'concept' is ignored. Writes one LoRA with all concepts that this "
                            "prompt names, such as a photo of <rex> and <mimi>, and the words of each. "
                            "Empty = off.",
                ),
            ],
            outputs=[io.String.Output(display_name="notes")],
        )

    @classmethod
    def validate_inputs(cls, strength):
        """Reports folders that cannot be written before the graph runs. ComfyUI only calls it if it takes an
        input."""
        try:
            for folder in ("loras", "embeddings"):
                check_output_folder(Path(folder_paths.get_output_directory()) / folder)
        except ConceptError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, bank, concept, format, strength, prompt="") -> io.NodeOutput:  # noqa: A002 - an input id
        if bank is None:
            raise ConceptError("the bank is new and holds no concept to export")
        if format not in FORMATS:
            raise ConceptError(f"format is {format!r}; allowed: {', '.join(FORMATS)}")
        output, name = Path(folder_paths.get_output_directory()), typed_name(concept)
        settings = {"formats": FORMATS[format], "strength": strength, "words_folder": output / "embeddings"}
        if prompt.strip():
            export = export_prompt(bank, prompt, output / "loras", **settings)
        elif name in ("", "*"):
            export = export_bank(bank, output / "loras", **settings)
        else:
            export = export_concept(bank, name, output / "loras", **settings)
        text = "\n".join([*(f"wrote {file.name}" for file in export.files), *export.notes])
        return io.NodeOutput(text, ui=ui.PreviewText(text))


register_folders()
NODES = [ConceptExport]

"""The nodes Export Concept and Share Concept: files for other programs, and for other people."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..core.bank.terms import Terms
from ..core.bank.tokens import typed_name
from ..core.errors import ConceptError
from ..core.files import check_output_folder
from ..core.interop.export import export_bank, export_concept
from ..core.interop.prompt_export import export_prompt
from ..core.interop.sharing import share_into
from . import types
from .inputs import valid
from .progress import written_below
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
                types.Bank.Input("bank", tooltip="The bank that holds the concept."),
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
                    tooltip="Writes one LoRA with all concepts that this prompt names, and their words. An "
                            "example is: a photo of <rex> and <mimi>. 'concept' is then ignored. Empty = "
                            "off.",
                ),
            ],
            outputs=[io.String.Output(display_name="notes")],
        )

    @classmethod
    def validate_inputs(cls, concept):
        """Reports folders that cannot be written before the graph runs. ComfyUI only calls it if it takes an
        input."""
        output = Path(folder_paths.get_output_directory())
        return valid(lambda: check_output_folder(output / "loras"),
                     lambda: check_output_folder(output / "embeddings"))

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
        notes = [*(f"wrote {file.name}" for file in export.files), *export.notes]
        return io.NodeOutput("\n".join(notes), ui=written_below(notes))


class ConceptShare(io.ComfyNode):
    """Writes one concept to a bank file of its own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptShare",
            display_name="Share Concept",
            category=types.BANKS,
            is_output_node=True,
            search_aliases=["share file", "publish concept", "licence", "license"],
            description="Writes one concept to a file of its own for other people, with its thumbnail, to "
                        "output/shared_concepts. To use it, they drop it onto ComfyUI's page. Existing files "
                        "are never replaced.",
            inputs=[
                types.Bank.Input("bank", tooltip="The bank that holds the concept. It does not change."),
                io.String.Input("concept", default="", placeholder="rex",
                                tooltip="Name of a concept in the bank; empty = the only one."),
                io.String.Input(
                    "licence", default="", placeholder="CC BY 4.0",
                    tooltip="What others may do with it, one line. It stays with the concept. Empty = the "
                            "one that the concept has."
                ),
                io.String.Input("author", default="",
                                tooltip="Who made it, one line. Empty = the author that the concept names."),
            ],
            outputs=[io.String.Output(display_name="notes")],
        )

    @classmethod
    def validate_inputs(cls, licence, author):
        """Reports a line that is too long, or a folder that cannot be written, before the graph runs. Text
        from another node is None at this point."""
        return valid(lambda: Terms((licence or "").strip()), lambda: Terms(author=(author or "").strip()),
                     lambda: check_output_folder(_shared_folder()))

    @classmethod
    def execute(cls, bank, concept, licence, author) -> io.NodeOutput:
        if bank is None or not len(bank):
            raise ConceptError("the bank is new and holds no concept to share")
        name = typed_name(concept)
        if not name and len(bank) > 1:
            raise ConceptError("'concept' is empty; type the name of the concept to share; the bank holds "
                               f"{', '.join(bank.names)}")
        notes = share_into(bank, name or bank.names[0], _shared_folder(), licence, author)[1]
        return io.NodeOutput("\n".join(notes), ui=written_below(notes))


def _shared_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / "shared_concepts"


register_folders()
NODES = [ConceptExport, ConceptShare]

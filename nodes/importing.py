"""The node Import Concept: imports LoRAs and embeddings of other programs."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..core.bank.bank import ConceptBank, differ
from ..core.bank.concepts import KINDS
from ..core.comfy.backbone import ComfyBackbone
from ..core.errors import ConceptError
from ..core.interop.importing import import_concept
from . import types
from .folders import offered, shown
from .inputs import valid
from .presets import checked_name
from .progress import written_below
from .schema import Schema

NONE = "(none)"


def _files(kind: str) -> list[str]:
    return [name for name in folder_paths.get_filename_list(kind) if name.endswith(".safetensors")]


def _file(kind: str, name: object) -> Path | None:
    """The file with this name. Only names listed in the folders are accepted, because workflows are
    untrusted.
    """
    if name == NONE:
        return None
    found = offered(name, _files(kind))
    if found is None:
        raise ConceptError(f"there is no file {shown(name)} in {kind}; put it into models/{kind} and press R "
                           "on the page, or choose another one (.safetensors files only)")
    return Path(folder_paths.get_full_path_or_raise(kind, found))


class ConceptImport(io.ComfyNode):
    """Imports a LoRA or an embedding as a concept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptImport",
            display_name="Import Concept",
            category=types.BANKS,
            search_aliases=["load lora", "textual inversion", "import lora"],
            description="Makes a concept from a LoRA, an embedding or both and adds it to a bank; <name> in "
                        "a prompt then activates it. Reads LoRA, DoRA, LoHa, LoKr, .diff and Custom "
                        "Diffusion. Only their text cross-attention is imported; the notes list the omitted "
                        "parts and their share.",
            inputs=[
                io.Model.Input("model", tooltip="A checkpoint of the family that the files were made for."),
                io.Clip.Input("clip", tooltip="From the same checkpoint."),
                io.Combo.Input("lora", options=[NONE, *_files("loras")], default=NONE,
                               tooltip="A LoRA from models/loras."),
                io.Combo.Input(
                    "embedding", options=[NONE, *_files("embeddings")], default=NONE,
                    tooltip="An embedding from models/embeddings."
                ),
                io.String.Input("name", default="", placeholder="rex",
                                tooltip="What you write in prompts: <rex>."),
                io.String.Input("class_noun", default="", placeholder="dog",
                                tooltip="An ordinary word for the concept."),
                io.Combo.Input("kind", options=list(KINDS), default=KINDS[0],
                               tooltip="object: a person, animal or thing. style: how pictures look."),
                io.String.Input(
                    "trigger", display_name="trigger words", default="",
                    tooltip="For a LoRA without an embedding: its trigger words, such as sks dog."
                ),
                types.Bank.Input("bank", optional=True,
                                 tooltip="The bank to add it to; not connected = a new one."),
                io.String.Input(
                    "which", display_name="which adapter", default="", optional=True,
                    tooltip="For a file with several adapters or embeddings: the one to import. For an "
                            "adapter and an embedding, write both with a comma between them. If it is "
                            "empty, an error lists them."
                ),
            ],
            outputs=[types.Bank.Output(display_name="bank"), io.String.Output(display_name="notes")],
        )

    @classmethod
    def validate_inputs(cls, lora, embedding):
        """Reports a missing file before the graph runs. Text from another node is None at this point."""
        return valid(lambda: lora is None or _file("loras", lora),
                     lambda: embedding is None or _file("embeddings", embedding))

    @classmethod
    def execute(cls, model, clip, lora, embedding, name, class_noun, kind, trigger,
                bank=None, which="") -> io.NodeOutput:
        backbone = ComfyBackbone(model, clip)
        if bank is not None:
            bank.check_fits(backbone.layout)
        result = import_concept(checked_name(name), class_noun.strip(), kind, backbone.layout,
                                backbone.text, _file("loras", lora),
                                _file("embeddings", embedding), trigger, which, backbone)
        alone, notes = ConceptBank(backbone.layout).add(result.concept), list(result.notes)
        if bank is None:
            bank = alone
        elif result.concept.name in bank and not differ(result.concept.name, bank, alone):
            notes.append(f"nothing to import: the bank holds this {result.concept.info.placeholder}")
        else:
            bank = bank.add(result.concept)
        return io.NodeOutput(bank, "\n".join(notes), ui=written_below(notes))


NODES = [ConceptImport]

"""Nodes that load, save, merge, edit and inspect banks."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from comfy_api.latest import io, ui

from ..core.bank.bank import differ, renamed_in
from ..core.bank.format import open_bank
from ..core.bank.store import change_bank, saved_elsewhere
from ..core.bank.tokens import typed_name
from ..core.demo.base import notes_on_weights
from ..core.errors import ConceptError, WriteError
from ..core.evaluation.bank_picture import bank_pages
from ..core.evaluation.inspection import inspect, lines
from ..core.files import check_output
from ..core.images import to_tensor
from ..core.training import checkpoint
from ..core.training.record import is_complete, is_finished
from . import types
from .folders import (
    NEW_BANK,
    bank_file,
    bank_names,
    checkpoint_folder,
    new_bank_file,
    register_folders,
)
from .images import judge
from .inputs import fingerprint, valid
from .progress import bank_saved, written_below
from .saving import ALLOW_FEWER, is_for_base_of, lost_names
from .schema import Schema

register_folders()


def _stamp(file: Path) -> tuple[str, int, int]:
    status = file.stat()
    return str(file), status.st_mtime_ns, status.st_size


class ConceptBankLoad(io.ComfyNode):
    """Loads a bank from disk, or starts a new one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptBankLoad",
            display_name="Load Concept Bank",
            category=types.EVERYDAY,
            search_aliases=["load bank", "concepts"],
            description="Reads a bank of concepts. Only its header is read now; a concept's weights are read "
                        "when they are used.",
            inputs=[
                io.Combo.Input(
                    "bank_name",
                    options=[NEW_BANK, *bank_names()],
                    default=NEW_BANK,
                    tooltip="Banks are in models/concept_banks and output/concept_banks.",
                )
            ],
            outputs=[types.Bank.Output(display_name="bank")],
        )

    @classmethod
    def validate_inputs(cls, bank_name):
        """Reports a missing bank before the graph runs. Text from another node is None at this point."""
        return valid(lambda: bank_name in (None, NEW_BANK) or bank_file(bank_name))

    @classmethod
    def fingerprint_inputs(cls, bank_name):
        return fingerprint(lambda: bank_name if bank_name == NEW_BANK else _stamp(bank_file(bank_name)))

    @classmethod
    def execute(cls, bank_name) -> io.NodeOutput:
        return io.NodeOutput(None if bank_name == NEW_BANK else open_bank(bank_file(bank_name)))


class ConceptBankSave(io.ComfyNode):
    """Saves a bank to disk."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptBankSave",
            display_name="Save Concept Bank",
            category=types.EVERYDAY,
            is_output_node=True,
            description="Writes a bank to output/concept_banks. The file is replaced only when the new one "
                        "is complete on disk.",
            inputs=[
                types.Bank.Input("bank", tooltip="The bank to save."),
                io.String.Input("bank_name", default="my-concepts", tooltip="Name of the file in "
                                "output/concept_banks: letters, digits, - and _."),
                io.Boolean.Input(
                    "allow_fewer",
                    display_name=ALLOW_FEWER,
                    default=False,
                    tooltip="Off: saving stops with an error if the file holds concepts that this bank "
                            "lacks. On: these concepts are removed from the file.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def validate_inputs(cls, bank_name):
        """Reports a wrong name, or a folder that cannot be written, before the graph runs. Text from another
        node is None at this point."""
        return valid(lambda: bank_name is None or check_output(new_bank_file(bank_name), "bank"))

    @classmethod
    def execute(cls, bank, bank_name, allow_fewer) -> io.NodeOutput:
        if bank is None:
            raise ConceptError("there is no bank to save; learn a concept first")
        path, replaced, removed = new_bank_file(bank_name), list[str](), list[str]()
        renamed = dict[str, str]()

        def change(stored):
            if stored is not None:
                renamed.update(renamed_in(bank, stored))
                lost = lost_names(stored.names, {*bank.names, *renamed})
                if lost and not allow_fewer:
                    join = ("join both with Load Concept Bank and Merge Concept Banks (nothing is learned "
                            "again), " if is_for_base_of(bank, stored) else "its base is another one; ")
                    raise ConceptError(f"'{path.name}' holds {lost}, which this bank lacks; {join}choose "
                                       f"another bank_name, or switch '{ALLOW_FEWER}' on")
                removed.extend(name for name in stored.names if name not in bank and name not in renamed)
                replaced.extend(name for name in stored.names if name in bank and differ(name, stored, bank))
            return bank

        try:
            change_bank(path, change)
        except WriteError as error:
            raise saved_elsewhere(error, path, bank) from error
        bank_saved()
        _remove_finished_runs(bank)
        names = ", ".join(f"<{name}>" for name in bank.names) or "no concepts"
        notes = [f"{path.name}: {names}"]
        notes += [f"renamed: <{old}> is <{new}> now" for old, new in renamed.items()]
        for what, found in (("replaced", replaced), ("removed", removed)):
            if found:
                notes.append(f"{what}: {', '.join(f'<{name}>' for name in found)}; the earlier file is kept "
                             "as a version, see this node's help")
        return io.NodeOutput(ui=written_below(notes))


def _remove_finished_runs(bank) -> None:
    """Deletes the checkpoints of runs whose concept is now in a bank file. Unfinished runs that learn it
    again, with other settings, stay."""
    for file in checkpoint_folder().glob("*.checkpoint"):
        run = checkpoint.identity(file)
        info = bank.infos.get(run.get("concept"))
        origin = None if info is None else info.provenance
        images = run.get("images")
        if origin is None or origin.base != run.get("base") or not isinstance(images, list):
            continue
        is_its = list(origin.images) == images or (origin.refined and set(images) <= set(origin.images))
        if is_its and _is_finished(file, origin):
            file.unlink(missing_ok=True)


def _is_finished(file, origin) -> bool:
    """Whether a checkpoint is of a run that came to its end, or that a stored concept comes from."""
    try:
        return is_complete(file) or is_finished(file, origin)
    except ConceptError:      # damaged
        return False


class ConceptBankMerge(io.ComfyNode):
    """Merges two banks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptBankMerge",
            display_name="Merge Concept Banks",
            category=types.BANKS,
            description="Joins the concepts of two banks. If they hold different concepts of one name, "
                        "rename one first.",
            inputs=[
                types.Bank.Input("bank",
                                 tooltip="Its concepts come first, and methods continue from its state."),
                types.Bank.Input("other",
                                 tooltip="Its concepts come last. An equal concept is taken once."),
            ],
            outputs=[types.Bank.Output(display_name="bank")],
        )

    @classmethod
    def execute(cls, bank, other) -> io.NodeOutput:
        if bank is None or other is None:
            return io.NodeOutput(other if bank is None else bank)
        merged = bank.merge(other)
        notes = notes_on_weights(merged.infos.values(), merged.layout)
        return io.NodeOutput(merged, ui=written_below(notes) or None)


class ConceptBankEdit(io.ComfyNode):
    """Renames or removes one concept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptBankEdit",
            display_name="Edit Concept Bank",
            category=types.BANKS,
            search_aliases=["rename concept", "delete concept", "forget"],
            description="Renames or removes a concept. The other concepts stay unchanged, bit for bit.",
            inputs=[
                types.Bank.Input("bank", tooltip="The bank to change. The input itself stays unchanged."),
                io.Combo.Input("action", options=["rename", "remove"], default="rename",
                               tooltip="Give the concept another name, or remove it."),
                io.String.Input("concept", default="", placeholder="rex",
                                tooltip="Name of a concept in the bank."),
                io.String.Input("new_name", default="", tooltip="The new name, for 'rename'."),
            ],
            outputs=[types.Bank.Output(display_name="bank")],
        )

    @classmethod
    def execute(cls, bank, action, concept, new_name="") -> io.NodeOutput:
        if bank is None:
            raise ConceptError("the bank is new and holds no concept to edit")
        if action not in ("rename", "remove"):
            raise ConceptError(f"action is {action!r}; allowed: rename, remove")
        name = typed_name(concept)
        if not name:
            raise ConceptError("'concept' is empty; type the name of a concept; the bank holds "
                               f"{', '.join(bank.names)}")
        # a graph that ran before, and whose bank was saved, has nothing left to do
        if action == "remove" and name not in bank:
            held = ", ".join(f"<{one}>" for one in bank.names) or "no concepts"
            note = f"nothing to remove: the bank holds no <{name}>; it holds {held}"
            return io.NodeOutput(bank, ui=written_below([note]))
        if action == "remove":
            return io.NodeOutput(bank.remove(name))
        new = typed_name(new_name)
        if name not in bank and new in bank:
            note = f"nothing to rename: the bank holds <{new}> and no <{name}>"
            return io.NodeOutput(bank, ui=written_below([note]))
        return io.NodeOutput(bank.rename(name, new))


class ConceptBankInspect(io.ComfyNode):
    """Shows the contents of a bank."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptBankInspect",
            display_name="Inspect Concept Bank",
            category=types.BANKS,
            is_output_node=True,
            search_aliases=["similar concepts", "collision", "bank contents"],
            description="Shows a bank's concepts as cards: thumbnails, methods, sizes, the most similar "
                        "concepts, and warnings where two collide.",
            inputs=[
                types.Bank.Input("bank", tooltip="The bank to show."),
                io.ClipVision.Input(
                    "clip_vision", optional=True,
                    tooltip="Compares thumbnails too, for example CLIP ViT-B/32. Without it, the encoder for "
                            "photos is used if it is installed; else only deltas and words are compared."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="cards"),
                io.String.Output(display_name="summary"),
                io.String.Output(display_name="report (JSON)"),
            ],
        )

    @classmethod
    def execute(cls, bank, clip_vision=None) -> io.NodeOutput:
        inspection = inspect(bank, None if bank is None else judge(clip_vision, bank.layout))
        picture = torch.cat([to_tensor(page) for page in bank_pages(inspection)])
        text = "\n".join(lines(inspection))      # not written below the node: the picture shows the same
        shown = {**ui.PreviewImage(picture, cls=cls).as_dict(), "text": (text,)}
        return io.NodeOutput(picture, text, json.dumps(inspection.to_json(), indent=1), ui=shown)


NODES = [ConceptBankLoad, ConceptBankSave, ConceptBankMerge, ConceptBankEdit, ConceptBankInspect]

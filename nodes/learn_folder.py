"""The node ConceptFolderLearner."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io, ui

from ..core.bank.bank import ConceptBank
from ..core.data.folder import read_folder
from ..core.data.listing import subfolders_with_pictures
from ..core.errors import ConceptError
from ..core.evaluation.bank_picture import bank_pages
from ..core.evaluation.inspection import inspect, lines
from ..core.files import check_output_folder
from ..core.images import to_tensor
from ..core.methods import DEFAULT
from ..core.training.config import TrainingConfig
from ..core.training.folders import (
    TABLE,
    Planned,
    check_parents,
    headline,
    passed_over,
    plan,
    read_as,
    reasons,
)
from ..core.training.presets import EFFORTS, NORMAL, SHORT_NAMES, SUBJECTS, kind_of
from . import types
from .folders import PAINTED, checkpoint_folder, input_folder, stamps_in
from .images import judge
from .inputs import fingerprint, setting_input, valid
from .learning import AGAIN, IF_KNOWN, KEEP, REFINE, Learning, learn_concept
from .presets import reader_input
from .progress import Part, say, stop_told, written_below
from .saving import check_saving
from .schema import Schema, advanced

ADVANCED = ("steps", "seed", "preview_every", "if_known", "find_subject", "caption_templates", "readable_by")

EMPTY = "put a folder of photo folders into ComfyUI's input folder"      # in the place of a list of folders


def _folders() -> list[str]:
    """Folders inside ComfyUI's input folder that hold folders of photos, as `a/b`, up to two levels deep."""
    root = Path(folder_paths.get_input_directory())
    if not root.is_dir():
        return []
    candidates = [path for pattern in ("*", "*/*") for path in root.glob(pattern)
                  if path.is_dir() and not path.name.startswith(".") and path != root / PAINTED]
    return sorted(path.relative_to(root).as_posix() for path in candidates if subfolders_with_pictures(path))


def _folder(name: object) -> Path:
    return input_folder(name, _folders(), "folders of photos", "make a folder of photos in it for each "
                        "concept, such as 'rex dog'", EMPTY)


class ConceptFolderLearner(io.ComfyNode):
    """Learns a concept from each subfolder of photos."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptFolderLearner",
            display_name="Learn a Folder of Concepts",
            category=types.ADVANCED,
            search_aliases=["batch train", "train several loras", "dataset", "teach"],
            description="Learns one concept from each folder of photos inside a folder, one after another, "
                        "and adds them to a bank. Folders are named 'rex dog': name and class noun. After "
                        "a cancel, the next run resumes exactly where it stopped.",
            inputs=advanced(ADVANCED, [
                io.Model.Input("model", tooltip="The checkpoint to learn on; it is not changed."),
                io.Clip.Input("clip", tooltip="From the same checkpoint."),
                io.Vae.Input("vae", tooltip="From the same checkpoint; it encodes the photos."),
                io.Combo.Input(
                    "folder",
                    options=_folders() or [EMPTY],
                    tooltip="A folder inside ComfyUI's input folder. It holds a folder of photos for each "
                            "concept, such as 'rex dog'. A table concepts.csv in it can give more details; "
                            "see the help.",
                ),
                io.Combo.Input("preset", options=list(SUBJECTS), default=SUBJECTS[0],
                               tooltip="What you teach. A table can name another preset for a concept. "
                                       "Chooses "
                                       "method, steps, learning rates, resolution and batch size for the "
                                       "model's family."),
                io.Combo.Input("effort", options=list(EFFORTS), default=NORMAL,
                               tooltip="How long the preset learns."),
                io.Int.Input("steps", default=0, min=0, max=100_000,
                             tooltip="Optimiser steps of each concept; 0 = the preset's."),
                setting_input(TrainingConfig, "seed"),
                io.Int.Input("preview_every", default=100, min=0, max=10_000,
                             tooltip="Steps between previews; 0 = no previews and no thumbnails."),
                io.Combo.Input("if_known", display_name=IF_KNOWN, options=[KEEP, AGAIN, REFINE], default=KEEP,
                               tooltip="What happens if the bank already holds a name. keep it: the "
                                       "concept stays if it was learned from these photos and settings. "
                                       "learn it again: it is replaced. refine it: learning continues from "
                                       "it with further photos."),
                io.Boolean.Input("find_subject", default=False,
                                 tooltip="Makes a mask for each photo without one: what differs from the "
                                         "photo's border."),
                io.Boolean.Input("caption_templates", default=False,
                                 tooltip="Gives each photo without a caption a short sentence, a different "
                                         "one for each. Off: they are learned as 'a photo of <name>'."),
                reader_input(),
                types.Bank.Input("bank", optional=True,
                                 tooltip="The bank to add them to; not connected = a new one."),
                types.Settings.Input("training_settings", optional=True,
                                     tooltip="From Concept Training Settings; for all concepts."),
                io.ClipVision.Input("clip_vision", optional=True,
                                    tooltip="Shows the likeness of every preview to the photos, and "
                                            "compares thumbnails for the report. Without it, the encoder "
                                            "for photos is used if it is installed."),
            ]),
            outputs=[
                types.Bank.Output(display_name="bank"),
                io.Image.Output(display_name="cards"),
                io.String.Output(display_name="report"),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def validate_inputs(cls, folder):
        """Reports a missing folder, or one that cannot be written, before the graph runs. Text from another
        node is None at this point."""
        return valid(lambda: folder is None or _folder(folder),
                     lambda: check_output_folder(checkpoint_folder()))

    @classmethod
    def fingerprint_inputs(cls, folder, **others):
        return fingerprint(lambda: stamps_in(_folder(folder)))

    @classmethod
    def execute(cls, folder, bank=None, **given) -> io.NodeOutput:
        path = _folder(folder)
        found = plan(path, is_confined=True)
        held = () if bank is None else bank.names
        check_parents(found, held)
        subjects = [_subject(planned, given["preset"]) for planned in found]
        node = getattr(cls.hidden, "unique_id", None)
        learned_now = [one.name for one in found if given["if_known"] != KEEP or one.name not in held]
        if learned_now:
            check_saving(getattr(cls.hidden, "prompt", None), node, bank, learned_now)
        notes = [] if os.path.lexists(path / TABLE) else [
            *read_as(found), *(f"'{file.name}' is not used: {file.reason}" for file in passed_over(path))]
        for note in notes:      # before the minutes of learning
            logging.warning("Learn a Folder of Concepts: %s", note)
        learned = 0
        failed: dict[str, list[str]] = {}
        for number, (planned, subject) in enumerate(zip(found, subjects, strict=True), start=1):
            part = Part(number, len(found), planned.name)
            try:
                with stop_told(node):
                    comfy.model_management.throw_exception_if_processing_interrupted()
                    say(node, part.status(planned.noun))
                    learning = _learn(planned, subject, bank, given, node, part)
            except ConceptError as error:
                logging.warning("Learn a Folder of Concepts: <%s> was not learned: %s", planned.name, error)
                failed.setdefault(str(error), []).append(planned.name)
                continue
            bank, learned = learning.bank, learned + learning.is_new
            notes += [f"<{planned.name}>: {note}" for note in learning.notes]
        known = len(found) - learned - sum(map(len, failed.values()))
        if not learned + known:
            raise ConceptError(f"no concept was learned: {'; '.join(reasons(failed))}")
        return _reported(bank, given.get("clip_vision"),
                         [headline("the bank", len(bank), learned, known),
                          *(f"not learned: {reason}" for reason in reasons(failed)), *notes])


def _subject(planned: Planned, usual: str) -> str:
    """The preset of a concept's row, else the node's. Raises ConceptError if it is for another kind."""
    subject = SHORT_NAMES[planned.preset] if planned.preset else usual
    if planned.kind not in ("", kind_of(subject)):
        raise ConceptError(f"the kind of concept '{planned.name}' is '{planned.kind}', and its preset is "
                           f"'{subject}'; give its row of {TABLE} a preset of this kind")
    return subject


def _learn(planned: Planned, subject: str, bank: ConceptBank | None, given: dict, node: str | None,
           part: Part) -> Learning:
    kind = kind_of(subject)
    with torch.inference_mode(False):
        photos = read_folder(planned.folder, planned.captions, planned.masks,
                             find_subject=given["find_subject"],
                             templates=kind if given["caption_templates"] else "")
    steps = {"steps": given["steps"]} if given["steps"] else {}
    inputs = {**given, "name": planned.name, "class_noun": planned.noun, "kind": kind,
              "method": DEFAULT, "variant_of": planned.variant_of,
              "preset": subject, "training_settings": {**(given.get("training_settings") or {}), **steps}}
    return learn_concept(inputs, bank, photos.pictures, node=node, part=part)


def _reported(bank: ConceptBank, clip_vision, notes: list[str]) -> io.NodeOutput:
    inspection = inspect(bank, judge(clip_vision, bank.layout))
    cards = torch.cat([to_tensor(page) for page in bank_pages(inspection)])
    details = ["", *lines(inspection)]
    shown = {**ui.PreviewImage(cards, cls=ConceptFolderLearner).as_dict(), **written_below(notes, details)}
    return io.NodeOutput(bank, cards, "\n".join([*notes, *details]), ui=shown)


NODES = [ConceptFolderLearner]

"""Nodes for photos from a folder, and for the embedded base."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..core.bank.concepts import KINDS
from ..core.comfy.demo import DemoVision, load_demo
from ..core.data.contact_sheet import contact_sheet
from ..core.data.folder import read_folder
from ..core.data.listing import MASKS, holds_photos
from ..core.data.pictures import captions_text, weights
from ..core.demo.bases import EMBEDDED, NAMES, picture_size
from ..core.errors import ConceptError
from ..core.images import to_tensor
from . import types
from .folders import PAINTED, input_folder, stamps_in
from .images import to_image
from .inputs import fingerprint, valid
from .progress import say
from .schema import Schema

NONE = "none"
EMPTY = "put a folder of photos into ComfyUI's input folder"      # in the place of a list of folders
FIRST = "embedded-64"      # the base of graphs that were saved before there was a choice


def _folders() -> list[str]:
    """Folders with pictures inside ComfyUI's input folder, as `a/b`, up to two levels deep. Folders of masks
    are left out, and so is ComfyUI's own folder of painted masks."""
    root = Path(folder_paths.get_input_directory())
    if not root.is_dir():
        return []
    candidates = [path for pattern in ("*", "*/*") for path in root.glob(pattern)
                  if path.is_dir() and not path.name.startswith(".") and path != root / PAINTED]
    return sorted(path.relative_to(root).as_posix() for path in candidates
                  if holds_photos(path) and not _holds_masks(path))


def _holds_masks(folder: Path) -> bool:
    """Whether a folder holds the masks of the photos in the folder above it."""
    above = folder.parent
    is_inside = above != Path(folder_paths.get_input_directory())
    return is_inside and folder.name.lower() == MASKS and holds_photos(above)


def _folder(name: object) -> Path:
    names = _folders()
    plain = name.replace("\\", "/").rstrip("/") if isinstance(name, str) else ""
    above, _, last = plain.rpartition("/")
    if last.lower() == MASKS and above in names:
        raise ConceptError(f"the folder '{name}' holds the masks of the photos in '{above}'; choose "
                           f"'{above}'")
    return input_folder(name, names, "photos", "put 3 to 10 photos into it", EMPTY)


class ConceptPhotosLoad(io.ComfyNode):
    """Loads photos with captions and masks from a folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptPhotosLoad",
            display_name="Load Concept Photos",
            category=types.EVERYDAY,
            search_aliases=["load images from folder", "dataset"],
            description="Loads every photo of a folder inside ComfyUI's input folder, with captions and "
                        "masks, and shows a contact sheet of what was used and what was not.",
            inputs=[
                io.Combo.Input(
                    "folder", options=_folders() or [EMPTY],
                    tooltip="A folder inside ComfyUI's input folder. name.txt beside a photo is its caption."
                ),
                io.Boolean.Input(
                    "find_subject", default=False, optional=True,
                    tooltip="Makes a mask for each photo without one: what differs from the photo's border. "
                            "The contact sheet shows it. A node that removes backgrounds does better."
                ),
                io.Combo.Input(
                    "caption_templates", options=[NONE, *KINDS], default=NONE, optional=True,
                    tooltip="Gives each photo without a caption a short sentence for an object or a style, "
                            "a different one for each photo. none: they are learned as 'a photo of <name>'."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", is_output_list=True),
                io.String.Output(display_name="captions"),
                io.Mask.Output(display_name="masks", is_output_list=True),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, folder):
        """Reports a missing folder before the graph runs. Text from another node is None at this point."""
        return valid(lambda: folder is None or _folder(folder))

    @classmethod
    def fingerprint_inputs(cls, folder, find_subject=False, caption_templates=NONE):
        return fingerprint(lambda: [find_subject, caption_templates, *stamps_in(_folder(folder))])

    @classmethod
    def execute(cls, folder, find_subject=False, caption_templates=NONE) -> io.NodeOutput:
        path = _folder(folder)
        photos = read_folder(path, find_subject=find_subject,
                             templates="" if caption_templates == NONE else caption_templates)
        images = [to_image(picture.pixels.unsqueeze(0)) for picture in photos.pictures]
        masks = [torch.ones(1, *picture.size) if mask is None else weights(mask)
                 for picture in photos.pictures for mask in [picture.stored_mask()]]
        captions = [" ".join(picture.caption.split()) for picture in photos.pictures]
        report = photos.report.checked()
        sheet = ui.PreviewImage(to_tensor(contact_sheet(report)), cls=cls).as_dict()
        say(getattr(cls.hidden, "unique_id", None), "\n".join(report.lines(with_photos=False)))
        shown = {**sheet, "text": ("\n".join(report.lines()),)}      # the picture shows the photos' lines
        return io.NodeOutput(images, captions_text(captions), masks, ui=shown)


class ConceptDemoBase(io.ComfyNode):
    """Loads the embedded base."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptDemoBase",
            display_name="Concept Demo Base",
            category=types.ADVANCED,
            description="A small model that ships with this pack, for a tour without a download: small "
                        "pictures of toys and animals. An Empty Latent Image of 128 x 128 gives its usual "
                        "size.",
            inputs=[
                io.Combo.Input("base", options=list(NAMES), default=EMBEDDED, optional=True,
                               tooltip="embedded: the newest one. Choose an older one for a bank that was "
                                       "made on it."),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                io.Vae.Output(display_name="vae"),
                io.ClipVision.Output(display_name="clip_vision"),
            ],
        )

    @classmethod
    def execute(cls, base=FIRST) -> io.NodeOutput:
        return io.NodeOutput(*load_demo(folder_paths.get_folder_paths("embeddings"), base), DemoVision())


class ConceptDemoPhotos(io.ComfyNode):
    """Draws the photos of a demo concept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..core.demo.scenes import CONCEPTS

        return Schema(
            node_id="ConceptDemoPhotos",
            display_name="Concept Demo Photos",
            category=types.ADVANCED,
            description="Gives a few pictures of a concept that the embedded base was not trained on.",
            inputs=[
                io.Combo.Input("concept", options=list(CONCEPTS),
                               tooltip="Two dogs, a cat, a robot and two drawing styles of the demo."),
                io.Int.Input("count", default=5, min=1, max=24, tooltip="How many photos."),
                io.Int.Input("seed", default=7, min=0, max=0xFFFFFFFF,
                             tooltip="Another seed gives other photos of the same concept."),
                io.Combo.Input("base", options=list(NAMES), default=EMBEDDED, optional=True,
                               tooltip="The base that learns from them; they are as large as its pictures."),
            ],
            outputs=[
                io.Image.Output(display_name="images"),
                io.String.Output(display_name="captions"),
                io.String.Output(display_name="class_noun"),
            ],
        )

    @classmethod
    def execute(cls, concept, count, seed, base=FIRST) -> io.NodeOutput:
        from ..core.demo.judges import to_tensor
        from ..core.demo.scenes import CONCEPTS

        if concept not in CONCEPTS:
            raise ConceptError(f"concept is {concept!r}; allowed: {', '.join(CONCEPTS)}")
        drawn = CONCEPTS[concept].pictures(count, seed, picture_size(base))
        images = to_image(to_tensor([picture for picture, _ in drawn]))
        return io.NodeOutput(images, "\n".join(caption for _, caption in drawn), CONCEPTS[concept].class_noun)


NODES = [ConceptPhotosLoad, ConceptDemoBase, ConceptDemoPhotos]

"""What our nodes need from the server: folders, progress, cancelling, pictures."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from PIL import Image
from torch import Tensor

from ..core.bank import ConceptBank
from ..core.bankfile import SUFFIX
from ..core.errors import ConceptError
from ..core.sampling import SampleSettings, sample
from ..core.tokens import check_name
from ..core.training.data import Picture
from ..core.training.loop import StepInfo

BANKS = "concept_banks"
NEW_BANK = "(new bank)"


def register_folders() -> None:
    """`concept_banks` in the models and the output folder, and those that extra_model_paths.yaml names; called at import of the nodes."""
    for parent in (folder_paths.models_dir, folder_paths.get_output_directory()):
        folder_paths.add_model_folder_path(BANKS, os.path.join(parent, BANKS))
    folder_paths.folder_names_and_paths[BANKS] = (folder_paths.folder_names_and_paths[BANKS][0], {SUFFIX})


def bank_names() -> list[str]:
    """Hidden files and folders hold earlier versions and unfinished runs."""
    names = folder_paths.get_filename_list(BANKS)
    return [name for name in names if not any(part.startswith(".") for part in Path(name).parts)]


def bank_file(name: str) -> Path:
    """An existing bank's file. The name comes from a workflow, which anybody may have written: it must be one that the folders list."""
    if name not in bank_names():
        raise ConceptError(f"there is no bank {name!r}; there are {', '.join(bank_names()) or 'none yet'}")
    path = folder_paths.get_full_path(BANKS, name)
    if path is None:
        raise ConceptError(f"the bank {name!r} cannot be found any more")
    return Path(path)


def output_folder() -> Path:
    folder = Path(folder_paths.get_output_directory()) / BANKS
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def new_bank_file(name: str) -> Path:
    """Where a bank of this name is saved. Names are letters, digits, - and _: no path can be made of them."""
    return output_folder() / f"{check_name(name.removesuffix(SUFFIX), 'bank name')}{SUFFIX}"


def checkpoint_file(name: str, key: str) -> Path:
    folder = output_folder() / ".unfinished"
    folder.mkdir(exist_ok=True)
    return folder / f"{check_name(name)}-{key}.checkpoint"


def first(value):
    """Of an input that arrives as a list (ConceptLearner takes lists of pictures, so everything does)."""
    return value[0] if isinstance(value, list) and value else value


def pictures_of(images: list[Tensor] | Tensor | None, what: str) -> list[Tensor]:
    """IMAGE batches `[B, H, W, C]` in 0..1, one or a list of them, as single pictures `[3, H, W]` in -1..1."""
    result = []
    for batch in [images] if torch.is_tensor(images) else images or []:
        if batch is None:
            continue
        if batch.ndim != 4 or batch.shape[-1] < 3 or min(batch.shape[:3]) < 1:
            raise ConceptError(f"{what} has a picture of shape {tuple(batch.shape)}; allowed: [count, height, width, 3]")
        if not torch.isfinite(batch).all():
            raise ConceptError(f"{what} has a picture with values that are no numbers (NaN or infinity)")
        result += [image.permute(2, 0, 1).float().cpu().clone() * 2 - 1 for image in batch[..., :3]]
    return result


def masks_of(masks: list[Tensor] | Tensor | None, what: str) -> list[Tensor]:
    """MASKs `[B, H, W]` or `[H, W]` as single masks `[1, H, W]`."""
    result = []
    for batch in [masks] if torch.is_tensor(masks) else masks or []:
        if batch is not None:
            result += [mask.float().cpu().clone().unsqueeze(0) for mask in (batch if batch.ndim == 3 else batch.unsqueeze(0))]
    for i, mask in enumerate(result):
        if not torch.isfinite(mask).all() or mask.max() <= 0:
            raise ConceptError(f"number {i + 1} of {what} is empty or has values that are no numbers (NaN); white must be somewhere")
    return result


def to_image(pictures: Tensor) -> Tensor:
    """`[B, 3, H, W]` in -1..1 as an IMAGE."""
    return ((pictures.float().cpu() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)


def with_masks(pictures: list[Tensor], captions: list[str], masks: list[Tensor]) -> list[Picture]:
    """Pictures with their captions and masks; counts must agree, one caption counts for all."""
    captions = captions * len(pictures) if len(captions) == 1 else captions or [""] * len(pictures)
    if len(captions) != len(pictures):
        raise ConceptError(f"there are {len(captions)} captions for {len(pictures)} pictures; give none, one, or one for each, a line each")
    if masks and len(masks) != len(pictures):
        raise ConceptError(f"there are {len(masks)} masks for {len(pictures)} pictures; give none or one for each")
    found = []
    for i, pixels in enumerate(pictures):
        mask = masks[i] if masks else None
        if mask is not None and mask.shape[1:] != pixels.shape[1:]:
            raise ConceptError(
                f"mask {i + 1} is {mask.shape[2]}x{mask.shape[1]}, its picture is {pixels.shape[2]}x{pixels.shape[1]}; "
                "they must have one size"
            )
        found.append(Picture(pixels, captions[i].strip(), mask, digest=_digest(pixels)))
    return found


def _digest(pixels: Tensor) -> str:
    return hashlib.sha256(((pixels + 1) * 127.5).round().clamp(0, 255).byte().numpy().tobytes()).hexdigest()[:16]


class Reporter:
    """The loop's callback: cancel button, progress bar, and a live sample from a fixed seed every `every` steps (0 = never)."""

    def __init__(self, total: int, backbone, prompt: str, every: int, settings: SampleSettings, seed: int) -> None:
        self.bar, self.total = comfy.utils.ProgressBar(total), total
        self.backbone, self.prompt, self.every, self.settings, self.seed = backbone, prompt, every, settings, seed
        self.previews: list[Tensor] = []

    def __call__(self, info: StepInfo) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview = None
        if self.every and info.step % self.every == 0 and info.step < self.total:
            preview = self.look(info.snapshot())
        self.bar.update_absolute(info.step, self.total, preview)

    def look(self, bank: ConceptBank):
        """Samples once; returns the preview in the progress bar's form."""
        picture = sample(self.backbone, bank, [self.prompt], [self.seed], self.settings)
        self.previews.append(to_image(picture))
        return preview(picture[0])


def preview(picture: Tensor):
    """A picture `[3, H, W]` in -1..1 in the progress bar's form."""
    return "JPEG", _pil(picture), 512


def _pil(picture: Tensor):
    image = Image.fromarray(((picture.float().cpu().permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy())
    return image.resize((image.width * 4, image.height * 4), Image.LANCZOS) if max(image.size) < 128 else image

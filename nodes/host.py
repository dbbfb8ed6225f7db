"""What our nodes need from the server: folders, progress, cancelling, pictures."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from PIL import Image
from torch import Tensor

from ..core.bank.bank import ConceptBank
from ..core.bank.format import SUFFIX
from ..core.bank.tokens import check_name
from ..core.errors import ConceptError
from ..core.evaluation.bankcheck import Encode
from ..core.evaluation.metrics import unit
from ..core.images import smoothed
from ..core.model.backbone import Backbone
from ..core.sampling.sampling import sample
from ..core.sampling.settings import SampleSettings
from ..core.training.trainer import StepInfo

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


LOOKS = 4      # pictures of a look that is measured: one alone says little


def vision(clip_vision) -> Encode:
    """A CLIP_VISION as a function: pictures `[3, H, W]` in -1..1 of any sizes to unit vectors `[n, D]` on the CPU, through ComfyUI's own
    preparation."""

    def encode(pictures: Sequence[Tensor]) -> Tensor:
        found = [clip_vision.encode_image(to_image(picture.unsqueeze(0)))["image_embeds"] for picture in pictures]
        if any(not torch.is_tensor(one) or one.ndim != 2 for one in found):
            raise ConceptError("the CLIP_VISION gives no vector per picture; load a CLIP vision model such as ViT-B/32, ViT-L or ViT-H")
        return unit(torch.cat(found).float().cpu())

    return encode


def say(node: str | None, text: str) -> None:
    """A line under a node while it works; nothing where no server runs or no page listens."""
    module = sys.modules.get("server")      # importing it would start one's parts
    server = getattr(getattr(module, "PromptServer", None), "instance", None)
    if node is not None and getattr(server, "client_id", None) is not None:
        server.send_progress_text(text, node)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


@dataclass
class Reporter:
    """The loop's callback: cancel button, progress bar, a line with loss and time left, and a live sample from a fixed seed every `every`
    steps (0 = never). With `alike` (pictures -> likeness to the photos) samples are measured, and a run can be judged by them."""

    total: int
    backbone: Backbone
    prompt: str
    every: int
    settings: SampleSettings
    seed: int
    alike: Callable[[Sequence[Tensor]], float] | None = None
    node: str | None = None
    previews: list[Tensor] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)      # of looks: step, likeness

    def __post_init__(self) -> None:
        self.bar, self.losses, self.times = comfy.utils.ProgressBar(self.total), [], []
        self.looked, self.shown = 0, None

    def __call__(self, info: StepInfo) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.losses.append(info.loss)
        self.times.append(time.monotonic())
        preview = None
        if self.every and info.step % self.every == 0 and info.step < self.total:
            if self.looked != info.step:      # the judge has not looked already
                self.look(info.snapshot(), info.step)
            preview = self.shown
        self.bar.update_absolute(info.step, self.total, preview)
        say(self.node, self._line(info.step))

    def _line(self, step: int) -> str:
        """The smoothed loss, the last likeness, and how long it still takes at the pace of this run, looks included."""
        parts = [f"step {step} of {self.total}", f"loss {smoothed(self.losses[-100:], 50)[-1]:.3f}"]
        if self.scores:
            parts.append(f"likeness {100 * self.scores[-1][1]:.1f}")
        if len(self.times) > 3 and step < self.total:
            pace = (self.times[-1] - self.times[0]) / (len(self.times) - 1)
            parts.append(f"{duration(pace * (self.total - step))} left")
        return ", ".join(parts)

    def judge(self, bank: ConceptBank, step: int) -> float:
        """For `learn`: the likeness of a look. It comes before the callback of the same step."""
        self.look(bank, step)
        return self.scores[-1][1]

    def look(self, bank: ConceptBank, step: int) -> None:
        """Samples; the first picture is kept for the strip, and in `shown` as the progress bar has it."""
        self.looked, count = step, 1 if self.alike is None else LOOKS
        pictures = sample(self.backbone, bank, [self.prompt] * count, range(self.seed, self.seed + count), self.settings)
        self.previews.append(to_image(pictures[:1]))
        self.shown = preview(pictures[0])
        if self.alike is not None:
            self.scores.append((step, self.alike(pictures)))


def preview(picture: Tensor):
    """A picture `[3, H, W]` in -1..1 in the progress bar's form."""
    return "JPEG", _pil(picture), 512


def _pil(picture: Tensor):
    image = Image.fromarray(((picture.float().cpu().permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy())
    return image.resize((image.width * 4, image.height * 4), Image.LANCZOS) if max(image.size) < 128 else image

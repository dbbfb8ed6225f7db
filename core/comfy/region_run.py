"""State of one sampling with regions in ComfyUI. It selects the attention processor of each UNet call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..model.context import Context
from ..model.deltas import Deltas
from ..model.processor import AttentionProcessor
from ..regional.crop_processor import CropProcessor
from ..regional.found import FoundRegions
from ..regional.observe import ObservedRegions
from ..regional.processor import Part, RegionProcessor
from ..regional.regions import Region
from .sites import UNetSites, progress_of
from .token_lora import TokenLoraRun


@dataclass
class RegionRun:
    """A sampling with regions. Builds the processors at the first call, when weights are on their device.

    Args:
        sites: The MODEL's sites.
        scene: The prompt of the whole picture.
        regions: Where and when each part acts.
        parts: One per region.
        words: Per region, the token positions whose attention is shown in the attention picture.
        word_bound: Concept -> its deltas, for the prompts of scene and regions.
        overlap: As in `regions.shares`.
        isolation: Share of the first steps with self-attention isolation.

    Attributes:
        alone: Numbers of the regions that are evaluated alone now, in batch order; None for the frame.
    """

    sites: UNetSites
    scene: Part
    regions: Sequence[Region]
    parts: Sequence[Part]
    words: Sequence[tuple[int, ...]]
    word_bound: Mapping[str, Deltas] = field(default_factory=dict)
    overlap: str = "average"
    isolation: float = 0.0
    alone: tuple[int, ...] | None = None
    _frames: dict[tuple[int, int], RegionProcessor] = field(default_factory=dict)
    _crops: dict[tuple[int, ...], CropProcessor] = field(default_factory=dict)
    _rows: dict[tuple, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._scene_words = TokenLoraRun(self.word_bound)

    def __call__(self, options: dict, x: Tensor) -> AttentionProcessor:
        """Returns the processor for a call with latents `[B, C, h, w]`."""
        kinds = tuple(options["cond_or_uncond"])      # the host's codes: 0 = positive, 1 = negative
        concepts = self._scene_words.concepts(options, x)
        if self.alone is not None:
            if self.alone not in self._crops:
                self._crops[self.alone] = self._crop_processor(self.alone, x)
            crops = self._crops[self.alone]
            crops.scene_concepts = concepts
            crops.take([1 - kind for kind in kinds], len(x))
            return crops
        size = (x.shape[-2], x.shape[-1])
        if size not in self._frames:
            self._frames[size] = self._frame_processor(size, x)
        frame = self._frames[size]
        frame.scene_concepts = concepts
        frame.rows, frame.progress = self._rows_of(kinds, x), progress_of(options)
        if isinstance(frame, ObservedRegions):
            frame.is_observing = frame.progress == 1.0 and 0 in kinds
        return frame

    def _rows_of(self, kinds: tuple[int, ...], x: Tensor) -> Tensor:
        """Half of guidance of each row, `[B]`. Calls of the same kind get the same tensor, because processors
        cache results by its identity.
        """
        key = kinds, len(x), str(x.device)
        if key not in self._rows:
            halves = torch.tensor([1 - kind for kind in kinds], device=x.device)
            self._rows[key] = halves.repeat_interleave(len(x) // len(kinds))
        return self._rows[key]

    def pooled(self, half: int) -> list[Tensor | None]:
        """The regions' pooled text `[1, P]`, of their negative prompts (0) or positive prompts (1). None if
        the model uses no pooled text.
        """
        pooled = [part.context.pooled for part in self.parts]
        return [None if rows is None else rows[half:half + 1] for rows in pooled]

    def maps(self, size: tuple[int, int]) -> Tensor:
        """Attention maps of the last step, one per region, `[U, H, W]` in 0..1."""
        observed = [frame for frame in self._frames.values() if isinstance(frame, ObservedRegions)]
        return observed[-1].picture_maps(size) if observed else torch.zeros(len(self.regions), *size)

    def _on_device_of(self, x: Tensor) -> tuple[Part, list[Part]]:
        """Moves the scene and the parts to the device of the latents."""
        def moved(deltas: Deltas) -> Deltas:
            return {key: delta.to(x.device) for key, delta in deltas.items()}

        used = {name for part in self.parts for words in part.context.words for name in words}
        word_bound = {name: moved(self.word_bound[name]) for name in used}
        contexts = [Context(part.context.hidden.to(x.device, x.dtype), None, part.context.words,
                            part.context.strengths)
                    for part in self.parts]
        parts = [Part(context, moved(part.deltas), word_bound)
                 for context, part in zip(contexts, self.parts, strict=True)]
        return replace(self.scene, deltas=moved(self.scene.deltas), word_bound={}), parts

    def _frame_processor(self, size: tuple[int, int], x: Tensor) -> RegionProcessor:
        scene, parts = self._on_device_of(x)
        return ObservedRegions(self.sites, scene, list(self.regions), parts, _NO_ROWS, size, self.overlap,
                               self.isolation, tokens=list(self.words))

    def _crop_processor(self, alone: tuple[int, ...], x: Tensor) -> CropProcessor:
        scene, parts = self._on_device_of(x)
        return CropProcessor(self.sites, scene, [parts[u] for u in alone])


_NO_ROWS = torch.zeros(1, dtype=torch.long)      # every call provides new ones


class FoundRun(RegionRun):
    """A sampling that finds its regions, see regional.found.

    Args:
        regions: One region per concept, over the whole picture, with the concept's name as prompt.
        words: Per concept, the positions of its words in the scene's prompt.
        parts: Per concept, its own prompt.
    """

    def _frame_processor(self, size: tuple[int, int], x: Tensor) -> RegionProcessor:
        scene, parts = self._on_device_of(x)
        names = [region.prompt for region in self.regions]
        return FoundRegions(self.sites, scene, names, parts, self.words, _NO_ROWS, size)

    def found(self) -> Tensor | None:
        """Masks of the first picture's regions `[U, h, w]`; None until they are found."""
        masks = [frame.found for frame in self._frames.values()
                 if isinstance(frame, FoundRegions) and frame.found is not None]
        return masks[-1][:, 0] if masks else None

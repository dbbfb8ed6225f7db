"""State of one sampling with regions in ComfyUI. It selects the attention processor of each UNet call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConceptError
from ..model.context import Context
from ..model.deltas import Deltas
from ..model.processor import AttentionProcessor
from ..regional.crop_processor import CropProcessor
from ..regional.found import FoundRegions
from ..regional.joint import JointCrops, JointRegions
from ..regional.observe import ObservedRegions, picture_maps
from ..regional.processor import Part, RegionProcessor
from ..regional.regions import Region, masks_of, regions_in, shares
from .families.base import Family
from .prompt_marks import MARKS, Mark
from .sites import progress_of
from .token_lora import TokenLoraRun

EVALUATED = "continual_concepts_evaluated"      # key in transformer_options: an `Evaluated`


@dataclass(frozen=True)
class Evaluated:
    """What the host evaluates.

    Attributes:
        frame: Height and width of the picture's latents.
        alone: Numbers of the regions that are evaluated alone, in batch order; None for the frame.
    """

    frame: tuple[int, int]
    alone: tuple[int, ...] | None = None


@dataclass
class RegionRun:
    """Samplings with regions, one after another. Builds the processors at the first call of each, when
    weights are on their device.

    Args:
        sites: The MODEL's sites.
        scene: The prompt of the whole picture.
        regions: Where and when each part acts.
        parts: One per region.
        words: Per region, the token positions whose attention is shown in the attention picture.
        word_bound: Concept -> its deltas, for the prompts of scene and regions.
        overlap: As in `regions.shares`.
        isolation: Share of the first steps with self-attention isolation.
        base: The host's model, to see whether hooks change its weights during a sampling.
    """

    sites: Family
    scene: Part
    regions: Sequence[Region]
    parts: Sequence[Part]
    words: Sequence[tuple[int, ...]]
    word_bound: Mapping[str, Deltas] = field(default_factory=dict)
    overlap: str = "average"
    isolation: float = 0.0
    base: Any = None
    _frames: dict[tuple, RegionProcessor | JointRegions] = field(default_factory=dict)
    _crops: dict[tuple[int, ...], CropProcessor | JointCrops] = field(default_factory=dict)
    _rows: dict[tuple, Tensor] = field(default_factory=dict)
    _maps: Mapping[int, Tensor] = field(default_factory=dict)
    _hooked: dict[tuple, bool] = field(default_factory=dict)      # whether hooks acted in the last call

    def __post_init__(self) -> None:
        self._scene_words = TokenLoraRun(self.word_bound)

    def begin(self) -> None:
        """Begins a sampling: nothing of an earlier one is used, because weights may have changed."""
        self._frames, self._crops, self._rows, self._maps, self._hooked = {}, {}, {}, {}, {}

    def end(self) -> None:
        """Ends a sampling: frees the memory and keeps what the picture shows."""
        maps = [frame.maps for frame in self._frames.values() if isinstance(frame, ObservedRegions)]
        self.begin()
        self._maps = maps[-1] if maps else {}

    def __call__(self, options: dict, x: Tensor) -> AttentionProcessor:
        """Returns the processor for a call with latents `[B, C, h, w]` or `[B, C, 1, h, w]`.

        Raises:
            ConceptError: The latent has several frames, or another node evaluates the picture in parts, so
                that regions cannot be located.
        """
        size, marks = (x.shape[-2], x.shape[-1]), options.get(MARKS)
        if x.ndim == 5 and x.shape[2] > 1:
            raise ConceptError(f"the latent has {x.shape[2]} frames of video; regions need one")
        evaluated: Evaluated = options.get(EVALUATED) or Evaluated(size)
        concepts = self._scene_words.concepts(options, x)
        if marks is not None and evaluated.alone is not None:
            if self._is_stale(evaluated.alone) or evaluated.alone not in self._crops:
                self._crops[evaluated.alone] = self._crop_processor(evaluated.alone, x)
            crops = self._crops[evaluated.alone]
            crops.scene_concepts = concepts
            crops.take([half for half, _ in marks], len(x))
            return crops
        frame = self._frame(size, marks, evaluated.frame, x)
        frame.scene_concepts = concepts
        if marks is not None:
            halves = tuple(half for half, _ in marks)
            frame.rows, frame.progress = self._rows_of(halves, x), progress_of(options)
            if isinstance(frame, ObservedRegions):
                frame.is_observing = frame.progress == 1.0 and 1 in halves
        return frame

    def _frame(self, size: tuple[int, int], marks: tuple[Mark, ...] | None, frame: tuple[int, int],
               x: Tensor) -> RegionProcessor | JointRegions:
        """The processor for a part of the frame: an area of the prompt's, or all of it. Prompts without marks
        have no regions.
        """
        area = None if marks is None else marks[0][1]
        whole = frame if area is None else area[:2]
        if marks is not None and (size[0] < whole[0] or size[1] < whole[1]):
            raise ConceptError(f"another node evaluates the latent of {frame[1]}x{frame[0]} cells in parts "
                               f"of {size[1]}x{size[0]} and does not say where they are; regions need the "
                               "whole picture, so remove that node or the regions")
        key = marks is None, size, area, frame if area else None
        if key not in self._frames:
            if marks is None:
                self._frames[key] = self._without_regions(size, x)
            else:
                regions = self.regions if area is None else regions_in(self.regions, frame, area)
                self._frames[key] = self._frame_processor(size, regions, x)
            self._is_stale(key)
        elif self._is_stale(key):
            self._frames[key].read_again()
        return self._frames[key]

    def _is_stale(self, key: tuple) -> bool:
        """Whether hooks may have changed the weights since the last call with this key."""
        hooks = getattr(getattr(self.base, "current_patcher", None), "current_hooks", None)
        had_hooks, self._hooked[key] = self._hooked.get(key, False), hooks is not None
        return had_hooks or hooks is not None

    def _rows_of(self, halves: tuple[int, ...], x: Tensor) -> Tensor:
        """Half of guidance of each row, `[B]`. Calls of the same kind get the same tensor, because processors
        cache results by its identity.
        """
        key = halves, len(x), str(x.device)
        if key not in self._rows:
            rows = torch.tensor(halves, device=x.device).repeat_interleave(len(x) // len(halves))
            self._rows[key] = rows
        return self._rows[key]

    def pooled(self, half: int) -> list[Tensor | None]:
        """The regions' pooled text `[1, P]`, of their negative prompts (0) or positive prompts (1). None if
        the model uses no pooled text.
        """
        pooled = [part.context.pooled for part in self.parts]
        return [None if rows is None else rows[half:half + 1] for rows in pooled]

    def maps(self, size: tuple[int, int]) -> Tensor:
        """Attention maps of the last step, one per region, `[U, H, W]` in 0..1. In a joint attention, whose
        maps are not observed, the regions themselves."""
        if self.sites.layout.is_joint:
            return shares(masks_of(self.regions, *size), self.overlap)[0]
        return picture_maps(self._maps, self.regions, self.overlap, size)

    def _on_device_of(self, x: Tensor) -> tuple[Part, list[Part]]:
        """Moves the scene and the parts to the device of the latents."""
        def moved(deltas: Deltas) -> Deltas:
            return {key: delta.to(x.device) for key, delta in deltas.items()}

        used = {name for part in self.parts for words in part.context.words for name in words}
        word_bound = {name: moved(self.word_bound[name]) for name in used}
        contexts = [Context(part.context.hidden.to(x.device, x.dtype), None, part.context.words,
                            part.context.strengths, part.context.lengths)
                    for part in self.parts]
        parts = [Part(context, moved(part.deltas), word_bound)
                 for context, part in zip(contexts, self.parts, strict=True)]
        return replace(self.scene, deltas=moved(self.scene.deltas), word_bound={}), parts

    def _without_regions(self, size: tuple[int, int], x: Tensor) -> RegionProcessor | JointRegions:
        if self.sites.layout.is_joint:
            return JointRegions([], [], size)
        return RegionProcessor(self.sites, self._on_device_of(x)[0], [], [], _NO_ROWS, size)

    def _frame_processor(self, size: tuple[int, int], regions: Sequence[Region],
                         x: Tensor) -> RegionProcessor | JointRegions:
        scene, parts = self._on_device_of(x)
        if self.sites.layout.is_joint:
            return JointRegions(regions, parts, size, self.overlap, self.isolation)
        return ObservedRegions(self.sites, scene, list(regions), parts, _NO_ROWS, size, self.overlap,
                               self.isolation, tokens=list(self.words))

    def _crop_processor(self, alone: tuple[int, ...], x: Tensor) -> CropProcessor | JointCrops:
        scene, parts = self._on_device_of(x)
        if self.sites.layout.is_joint:
            return JointCrops([parts[u] for u in alone])
        return CropProcessor(self.sites, scene, [parts[u] for u in alone])


_NO_ROWS = torch.zeros(1, dtype=torch.long)      # every call provides new ones


class FoundRun(RegionRun):
    """A sampling that finds its regions, see regional.found.

    Args:
        regions: One region per concept, over the whole picture, with the concept's name as prompt.
        words: Per concept, the positions of its words in the scene's prompt.
        parts: Per concept, its own prompt.
    """

    _found: Tensor | None = None

    def _frame_processor(self, size: tuple[int, int], regions: Sequence[Region],
                         x: Tensor) -> RegionProcessor:
        scene, parts = self._on_device_of(x)
        names = [region.prompt for region in regions]
        return FoundRegions(self.sites, scene, names, parts, self.words, _NO_ROWS, size)

    def end(self) -> None:
        masks = [frame.found for frame in self._frames.values()
                 if isinstance(frame, FoundRegions) and frame.found is not None]
        super().end()
        self._found = masks[-1][:, 0] if masks else None

    def found(self) -> Tensor | None:
        """Masks of the first picture's regions `[U, h, w]`; None until they are found."""
        return self._found

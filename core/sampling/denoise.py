"""One sampling step with regions, the same in every host: which latents are evaluated, in which batches, and
how the estimates are mixed.

Most steps are one evaluation of the frame, in which regions read their own prompts (region attention). Two
kinds of steps need more:

* Crop denoising, ours, in the first steps: each region is denoised alone on a crop of its size, as a picture
  of its own, so the concept that its prompt names has to appear there. The frame is evaluated only where
  regions leave some of it to the scene.
* Region noise estimation (CIDM, Sec. 3.4): the frame, and each region's own noise over the frame or on its
  crop.

Crops of one size share a batch, as long as they have no more cells than the frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..regional.crops import Crop, batches_of, crops_of
from ..regional.noise import NoiseSettings, region_noise, scene_is_seen
from ..regional.regions import Region, masks_of


class Evaluate(Protocol):
    """A host's evaluation of latents at the step's timestep."""

    def __call__(self, latents: Tensor, regions: tuple[int, ...] | None) -> Mapping[str, Tensor]:
        """Returns guided noise estimates, under names of the host's choice.

        Args:
            latents: The frame `[B, C, h, w]`, or crops of R regions `[R * B, C, h', w']`, region by region.
            regions: Numbers of the regions that are denoised alone; None for the frame with all regions.

        Returns:
            Noise estimates of the latents' shape, with guidance applied.
        """


@dataclass(frozen=True)
class RegionStep:
    """A step that evaluates regions alone.

    Args:
        regions: Numbers of the U active regions.
        masks: `[U, h, w]` in 0..1.
        crops: One for each region.
        batches: Indices into `regions`, grouped by batch.
        needs_frame: Whether the frame is evaluated.
        alpha, outside, overlap: How estimates are mixed, see `region_noise`.
    """

    regions: tuple[int, ...]
    masks: Tensor
    crops: tuple[Crop, ...]
    batches: tuple[tuple[int, ...], ...]
    needs_frame: bool
    alpha: float
    outside: str
    overlap: str

    def estimate(self, latents: Tensor, evaluate: Evaluate) -> dict[str, Tensor]:
        """The mixed noise estimates `[B, C, h, w]`, under the names that `evaluate` returns."""
        size = (latents.shape[-2], latents.shape[-1])
        frame = evaluate(latents, None) if self.needs_frame else {}
        own: dict[str, dict[int, Tensor]] = {}
        for batch in self.batches:
            cut = torch.cat([self.crops[i].cut(latents) for i in batch])
            for name, noise in evaluate(cut, tuple(self.regions[i] for i in batch)).items():
                for i, part in zip(batch, noise.chunk(len(batch)), strict=True):
                    own.setdefault(name, {})[i] = self.crops[i].paste(part, size)
        return {name: self._mixed(frame.get(name), [parts[i] for i in range(len(self.regions))])
                for name, parts in own.items()}

    def _mixed(self, frame: Tensor | None, own: Sequence[Tensor]) -> Tensor:
        frame = torch.zeros_like(own[0]) if frame is None else frame
        return region_noise(frame, torch.stack(list(own)), self.masks, self.alpha, self.outside, self.overlap)


class RegionSteps:
    """Decides for each sampling step whether regions are evaluated alone. Layouts are cached per kind of
    step.
    """

    def __init__(self, regions: Sequence[Region], noise: NoiseSettings, overlap: str) -> None:
        self.regions, self.noise, self.overlap = list(regions), noise, overlap
        self._steps: dict[tuple, RegionStep] = {}

    def at(self, progress: float, latents: Tensor) -> RegionStep | None:
        """The step at a share `progress` of the sampling for latents `[B, C, h, w]`; None = evaluate only the
        frame.
        """
        on = tuple(u for u, region in enumerate(self.regions) if region.active(progress) and region.strength)
        crop_denoising = progress < self.noise.crop_denoising
        if not on or not (crop_denoising or self.noise.is_on):
            return None
        key = on, crop_denoising, latents.shape[-2], latents.shape[-1], str(latents.device)
        if key not in self._steps:
            self._steps[key] = self._laid_out(on, crop_denoising, latents)
        return self._steps[key]

    def _laid_out(self, on: tuple[int, ...], crop_denoising: bool, latents: Tensor) -> RegionStep:
        height, width = latents.shape[-2:]
        # With a soft edge, a crop would overlap its neighbour.
        masks = masks_of([self.regions[u] for u in on], height, width, feathered=not crop_denoising)
        crops = crops_of(masks, crop_denoising or self.noise.area == "crop")
        batches = tuple(tuple(batch) for batch in batches_of(crops, height * width))
        needs_frame = not crop_denoising or scene_is_seen(masks, self.overlap)
        alpha, outside = (0.0, "keep") if crop_denoising else (self.noise.alpha, self.noise.outside)
        masks = masks.to(latents.device)
        return RegionStep(on, masks, tuple(crops), batches, needs_frame, alpha, outside, self.overlap)

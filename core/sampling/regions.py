"""Pictures of a scene with regions, each with a prompt of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..bank.bank import ConceptBank
from ..bank.prompts import Prompt
from ..conditioning.routing import aggregate, always_on_deltas
from ..model.backbone import AttentionProcessor, Backbone, Context
from ..model.solver import DpmSolver, denoise, guided
from ..regional.noise import Window, region_noise, scene_is_seen, windows_of
from ..regional.processor import DeltaAndTokenLoraProcessor, Part, RegionProcessor
from ..regional.regions import Region, masks_of, pooled_of
from .sampling import encode, on_device, repeated, sample, starting_noise, word_bound_deltas
from .settings import SampleSettings


def part_of(backbone: Backbone, bank: ConceptBank, prompt: Prompt, negative: Prompt, settings: SampleSettings) -> Part:
    own = aggregate(backbone, bank, prompt, settings.mode, settings.strength, always_on=False).deltas
    context = Context.cat([encode(backbone, bank, [negative]), encode(backbone, bank, [prompt])])
    bound = word_bound_deltas(backbone, bank, [prompt, negative], settings)
    return Part(context, on_device(backbone, own), bound)      # moved once, not in every step


def guidance_rows(backbone: Backbone, count: int, cfg: float) -> Tensor:
    """Of the UNet's batch: 0 = the negative half of guidance, 1 = the positive one."""
    return torch.tensor([1] * count if cfg == 1.0 else [0] * count + [1] * count, device=backbone.device)


class _RegionSampling:
    """One sampling with regions: parts encoded once, a program for the whole, and each region's own estimate where that is asked for."""

    def __init__(self, backbone: Backbone, bank: ConceptBank, scene: Prompt, regions: Sequence[Region], count: int,
                 settings: SampleSettings, latent: tuple[int, int]) -> None:
        self.backbone, self.bank, self.regions, self.count, self.settings = backbone, bank, list(regions), count, settings
        self.parts = [part_of(backbone, bank, bank.parse(region.prompt), bank.parse(region.negative or settings.negative), settings)
                      for region in regions]
        self.whole = self._with_pooled(part_of(backbone, bank, scene, bank.parse(settings.negative), settings), latent)
        rows = guidance_rows(backbone, count, settings.cfg)
        self.processor = RegionProcessor(backbone, self.whole, self.regions, self.parts, rows, latent, settings.overlap, settings.isolation)
        self.soft, self.hard = (masks_of(self.regions, *latent, feathered).to(backbone.device) for feathered in (True, False))

    def _with_pooled(self, scene: Part, latent: tuple[int, int]) -> Part:
        if scene.context.pooled is None:
            return scene
        pooled = pooled_of(self.regions, scene.context.pooled, [p.context.pooled for p in self.parts], latent, self.settings.overlap)
        return replace(scene, context=replace(scene.context, pooled=pooled))

    def _guided(self, x: Tensor, t: int, one: Part, sites: AttentionProcessor) -> Tensor:
        negative, positive = (repeated(one.context[i:i + 1], self.count) for i in (0, 1))
        return guided(self.backbone, x, t, negative, positive, self.settings.cfg, sites)

    def _own(self, x: Tensor, t: int, part: Part, window: Window) -> Tensor:
        """A region's own estimate on a window, zeros around it."""
        return window.back(self._guided(window.cut(x), t, part, DeltaAndTokenLoraProcessor(part.deltas, part.bound)), x)

    def estimate(self, x: Tensor, t: int, progress: float) -> Tensor:
        settings, on = self.settings, [u for u, region in enumerate(self.regions) if region.active(progress) and region.strength]
        solo, self.processor.progress = progress < settings.noise.solo, progress
        masks = (self.hard if solo else self.soft)[on].to(x)      # over a soft edge a window would reach into its neighbour
        if solo and on and not scene_is_seen(masks, settings.overlap):
            noise = torch.zeros_like(x)
        else:
            noise = self._guided(x, t, self.whole, self.processor)
        if not on or not (solo or settings.noise.is_on):
            return noise
        windows = windows_of(masks, solo or settings.noise.area == "crop")
        own = torch.stack([self._own(x, t, self.parts[u], window) for u, window in zip(on, windows, strict=True)])
        alpha, outside = (0.0, "keep") if solo else (settings.noise.alpha, settings.noise.outside)
        return region_noise(noise, own, masks, alpha, outside, settings.overlap)


@torch.no_grad()
def sample_regions(backbone: Backbone, bank: ConceptBank, scene: str | Prompt, regions: Sequence[Region], seeds: Sequence[int],
                   settings: SampleSettings) -> Tensor:
    """Pictures of a scene prompt with regions: region attention, and region noise estimation and solo steps as `settings.noise` says.

    One UNet evaluation per step for any number of regions. With region noise one more for every region that is on, over the full frame
    (the paper's form) or on its window (`area="crop"`); in solo steps windows alone, and the frame only where the scene is seen.
    """
    if not regions:
        return sample(backbone, bank, [scene] * len(seeds), seeds, settings)
    bank.check_fits(backbone.layout)
    with backbone.folded(always_on_deltas(bank, averages=True)):
        latents = starting_noise(backbone, seeds, settings.size).to(backbone.device)
        run = _RegionSampling(backbone, bank, bank.parse(scene), regions, len(seeds), settings, tuple(latents.shape[-2:]))
        return backbone.decode_latents(denoise(DpmSolver(backbone.schedule, settings.steps), latents, run.estimate))

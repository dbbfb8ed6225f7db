"""Samples a scene with regions, each with its own prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..attention.token_lora import TokenLora
from ..bank.bank import ConceptBank
from ..bank.prompts import Prompt
from ..conditioning.routing import aggregate, always_on_deltas
from ..errors import ConceptError
from ..model.backbone import Backbone
from ..model.context import Context
from ..model.deltas import Deltas
from ..model.processor import AttentionProcessor
from ..model.solver import denoise, guided, solver_for
from ..regional.crop_processor import CropProcessor
from ..regional.joint import JointCrops, JointRegions
from ..regional.processor import Part, RegionProcessor
from ..regional.regions import Region, pooled_of
from .denoise import RegionSteps
from .sampling import encode, encode_negative, on_device, sample, starting_noise, word_bound_deltas
from .settings import SampleSettings


def part_of(backbone: Backbone, bank: ConceptBank, prompt: Prompt, negative: Prompt,
            settings: SampleSettings, others: Sequence[Prompt] = ()) -> Part:
    """Encodes a prompt and its negative prompt and collects their deltas, on the backbone's device. others:
    Prompts whose deltas act here, too."""
    deltas = aggregate(backbone, bank, prompt, settings.mode, settings.strength, always_on=False).deltas
    context = Context.cat([encode_negative(backbone, bank, negative, [prompt, *others], settings.mode),
                           encode(backbone, bank, [prompt])])
    word_bound = word_bound_deltas(backbone, bank, [prompt], negative, settings, others)
    return Part(context, on_device(backbone, deltas), word_bound)


def guidance_rows(backbone: Backbone, count: int, cfg: float) -> Tensor:
    """`[B]` for the UNet's batch: 0 = the negative half of guidance, 1 = the positive one."""
    return torch.tensor([1] * count if cfg == 1.0 else [0] * count + [1] * count, device=backbone.device)


class JointFrame(JointRegions):
    """`JointRegions` whose scene's concepts are read from each call's prompts.

    Args:
        scene: The scene's word-bound concepts -> their deltas.
        rows: Half of guidance of each row.
        regions, parts, latent, settings: See `JointRegions`.
    """

    def __init__(self, scene: Mapping[str, Deltas], rows: Tensor, regions: Sequence[Region],
                 parts: Sequence[Part], latent: tuple[int, int], settings: SampleSettings) -> None:
        super().__init__(regions, parts, latent, settings.overlap, settings.isolation)
        self.scene, self.rows = scene, rows

    def prepare(self, context: Context) -> None:
        self.scene_concepts, self.scene_fills = TokenLora(self.scene, context), context.fills()


def scene_weights(backbone: Backbone, scene: Part, regions: Sequence[Region],
                  parts: Sequence[Part]) -> Deltas:
    """What the scene's prompt adds to the weights. In a joint attention, text and picture have one weight for
    all regions; elsewhere the processor adds deltas where they act.

    Raises:
        ConceptError: In a joint attention, a region names a concept that the scene does not name and that
            acts on the whole picture.
    """
    if not backbone.layout.is_joint:
        return {}
    for region, part in zip(regions, parts, strict=True):
        if set(part.deltas) - set(scene.deltas):
            raise ConceptError(f"the region '{region.prompt}' names a concept that acts on the whole picture "
                               "on this model; name it in the scene's prompt instead")
    return scene.deltas


class RegionSampling:
    """One sampling of `count` pictures with regions. Encodes prompts once and builds processors for the frame
    and for crops.

    Args:
        latent: Height and width of the latents.
    """

    def __init__(self, backbone: Backbone, bank: ConceptBank, scene: Prompt, regions: Sequence[Region],
                 count: int, settings: SampleSettings, latent: tuple[int, int]) -> None:
        self.backbone, self.count, self.settings = backbone, count, settings
        self.steps = RegionSteps(regions, settings.noise, settings.overlap)
        prompts = [(bank.parse(region.prompt), bank.parse(region.negative or settings.negative))
                   for region in regions]
        acting = [scene] if backbone.layout.is_joint else []      # see scene_weights
        self.parts = [part_of(backbone, bank, prompt, negative, settings, acting)
                      for prompt, negative in prompts]
        self.scene = part_of(backbone, bank, scene, bank.parse(settings.negative), settings)
        if self.scene.context.pooled is not None:
            texts = [part.context.pooled for part in self.parts if part.context.pooled is not None]
            pooled = pooled_of(regions, self.scene.context.pooled, texts, latent, settings.overlap)
            self.scene = replace(self.scene, context=replace(self.scene.context, pooled=pooled))
        rows = guidance_rows(backbone, count, settings.cfg)
        self.weights = scene_weights(backbone, self.scene, regions, self.parts)
        self.processor: RegionProcessor | JointFrame
        if backbone.layout.is_joint:
            self.processor = JointFrame(self.scene.word_bound, rows, regions, self.parts, latent, settings)
        else:
            self.processor = RegionProcessor(backbone, self.scene, list(regions), self.parts, rows, latent,
                                             settings.overlap, settings.isolation)
        self._crops: dict[tuple[int, ...], CropProcessor | JointCrops] = {}

    def estimate(self, latents: Tensor, t: int, progress: float) -> Tensor:
        """The guided noise of latents `[B, C, h, w]` at a timestep."""
        def evaluate(latents: Tensor, regions: tuple[int, ...] | None) -> dict[str, Tensor]:
            noise = self._alone(latents, t, regions) if regions else self._frame(latents, t, progress)
            return {"noise": noise}

        step = self.steps.at(progress, latents)
        estimates = evaluate(latents, None) if step is None else step.estimate(latents, evaluate)
        return estimates["noise"]

    def _frame(self, latents: Tensor, t: int, progress: float) -> Tensor:
        self.processor.progress = progress
        return self._guided(latents, t, [self.scene], self.processor)

    def _alone(self, latents: Tensor, t: int, regions: tuple[int, ...]) -> Tensor:
        if regions not in self._crops:
            own = [self.parts[u] for u in regions]
            self._crops[regions] = (JointCrops(own) if self.backbone.layout.is_joint
                                    else CropProcessor(self.backbone, self.scene, own))
        processor, halves = self._crops[regions], [1] if self.settings.cfg == 1.0 else [0, 1]
        processor.take(halves, len(halves) * len(latents))
        return self._guided(latents, t, [self.parts[u] for u in regions], processor)

    def _guided(self, latents: Tensor, t: int, parts: Sequence[Part],
                processor: AttentionProcessor) -> Tensor:
        """Guided noise of latents `[P * B, C, h, w]` of P parts, ordered by part."""
        contexts = [part.context for part in parts for _ in range(self.count)]
        negative, positive = (Context.cat([context[half:half + 1] for context in contexts])
                              for half in (0, 1))
        return guided(self.backbone, latents, t, negative, positive, self.settings.cfg, processor)


@torch.no_grad()
def sample_regions(backbone: Backbone, bank: ConceptBank, scene: str | Prompt, regions: Sequence[Region],
                   seeds: Sequence[int], settings: SampleSettings) -> Tensor:
    """Samples a scene with regions. `settings.noise` selects region noise and crop denoising.

    A step is one evaluation for any number of regions. Region noise adds one evaluation per active region,
    over the frame or on its crop. Crop denoising evaluates only crops, plus the frame if regions do not cover
    all of it.

    Returns:
        `[B, 3, H, W]` in -1..1, one picture for each seed.
    """
    if not regions:
        return sample(backbone, bank, [scene] * len(seeds), seeds, settings)
    bank.check_fits(backbone.layout)
    with backbone.folded(always_on_deltas(bank, averages=True)):
        latents = starting_noise(backbone, seeds, settings.size).to(backbone.device)
        latent = (latents.shape[-2], latents.shape[-1])
        run = RegionSampling(backbone, bank, bank.parse(scene), regions, len(seeds), settings, latent)
        with backbone.folded(run.weights):
            latents = denoise(solver_for(backbone.schedule, settings.steps), latents, run.estimate,
                              on_step=settings.on_step)
        return backbone.decode_latents(latents)

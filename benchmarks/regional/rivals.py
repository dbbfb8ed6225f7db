"""Ways to sample several concepts in one picture, with the same request: variants of our method, and common
alternatives.

* `prompt`: one prompt that names all concepts. * `masked`: ComfyUI's masked conditioning. Each region's noise
  is estimated over the whole frame, and masks mix the estimates. The deltas of all concepts act at once. *
  `hooks`: like `masked`, but each concept's deltas act only in its own estimate (LoRA hooks). Both need one
  evaluation per region and step. * `couple`: Attention Couple. One evaluation, in which each region has the
  keys and values of its own prompt, but all deltas act at once in the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core.attention.token_lora import TokenLoraProcessor
from ...core.bank.bank import ConceptBank
from ...core.conditioning.routing import aggregate
from ...core.model.backbone import Backbone
from ...core.model.context import Context
from ...core.model.deltas import Deltas
from ...core.model.processor import AttentionProcessor
from ...core.model.solver import denoise, guided, solver_for
from ...core.regional.noise import NoiseSettings, region_noise
from ...core.regional.processor import Part, RegionProcessor
from ...core.regional.regions import Box, Region, masks_of
from ...core.sampling.found import sample_found
from ...core.sampling.regions import guidance_rows, sample_regions
from ...core.sampling.sampling import encode, repeated, sample, starting_noise
from ...core.sampling.settings import SampleSettings

CROP_DENOISING = 0.7      # high: the embedded base has one training size; crops fix the layout
ISOLATION = 1.0
FEATHER = 0.1


@dataclass(frozen=True)
class Request:
    """A request to every way: one picture per seed, of the settings' size.

    Args:
        names: The concepts.
        boxes: Requested position of each concept.
        place: Description of the scene's place.
        feather: Width of the regions' soft edges.
    """

    names: tuple[str, ...]
    boxes: tuple[Box, ...]
    place: str
    seeds: tuple[int, ...]
    settings: SampleSettings
    feather: float = 0.0

    @property
    def regions(self) -> list[Region]:
        prompts = [f"a photo of <{name}> {self.place}" for name in self.names]
        return [Region(prompt, box, feather=self.feather)
                for prompt, box in zip(prompts, self.boxes, strict=True)]

    @property
    def scene(self) -> str:
        return f"a photo {self.place}"

    @property
    def listed(self) -> str:
        """One prompt that names all concepts."""
        words = [f"<{name}>" for name in self.names]
        together = f"{', '.join(words[:-1])} and {words[-1]}" if words[1:] else words[0]
        return f"a photo of {together} {self.place}"


def ours(backbone: Backbone, bank: ConceptBank, request: Request) -> Tensor:
    """Crop denoising, region attention and self-attention isolation."""
    noise = NoiseSettings(crop_denoising=CROP_DENOISING)
    settings = replace(request.settings, noise=noise, isolation=ISOLATION)
    return sample_regions(backbone, bank, request.scene, request.regions, request.seeds, settings)


def one_pass(backbone: Backbone, bank: ConceptBank, request: Request) -> Tensor:
    """Our method without crop denoising and isolation: only region attention."""
    return sample_regions(backbone, bank, request.scene, request.regions, request.seeds, request.settings)


def feathered(backbone: Backbone, bank: ConceptBank, request: Request) -> Tensor:
    """Our method with soft edges."""
    return ours(backbone, bank, replace(request, feather=FEATHER))


def found(backbone: Backbone, bank: ConceptBank, request: Request) -> Tensor:
    """Our method without boxes: the prompt of `prompt`, with each concept restricted to the region where it
    is found.
    """
    return sample_found(backbone, bank, request.listed, request.seeds, request.settings)


def prompt(backbone: Backbone, bank: ConceptBank, request: Request) -> Tensor:
    return sample(backbone, bank, [request.listed] * len(request.seeds), request.seeds, request.settings)


def _all_deltas(backbone: Backbone, bank: ConceptBank, request: Request) -> Deltas:
    return aggregate(backbone, bank, bank.parse(request.listed)).deltas


def _mixed_by_masks(backbone: Backbone, bank: ConceptBank, request: Request, folded: Deltas,
                    processors: Sequence[AttentionProcessor | None]) -> Tensor:
    """Estimates each region's noise over the whole frame and mixes the estimates by masks."""
    settings, count = request.settings, len(request.seeds)
    negative = repeated(encode(backbone, bank, [settings.negative]), count)
    positives = [repeated(encode(backbone, bank, [region.prompt]), count) for region in request.regions]
    latents = starting_noise(backbone, request.seeds, settings.size).to(backbone.device)
    masks = masks_of(request.regions, latents.shape[-2], latents.shape[-1])

    def estimate(x: Tensor, t: int, _progress: float) -> Tensor:
        noises = [guided(backbone, x, t, negative, positive, settings.cfg, processor)
                  for positive, processor in zip(positives, processors, strict=True)]
        return region_noise(torch.zeros_like(x), torch.stack(noises), masks, 0.0)

    with backbone.folded(folded):
        latents = denoise(solver_for(backbone.schedule, settings.steps), latents, estimate)
        return backbone.decode_latents(latents)


@torch.no_grad()
def masked(backbone: Backbone, bank: ConceptBank, request: Request) -> Tensor:
    nothing: list[AttentionProcessor | None] = [None] * len(request.names)
    return _mixed_by_masks(backbone, bank, request, _all_deltas(backbone, bank, request), nothing)


@torch.no_grad()
def hooks(backbone: Backbone, bank: ConceptBank, request: Request) -> Tensor:
    deltas = [aggregate(backbone, bank, bank.parse(region.prompt)).deltas for region in request.regions]
    processors = [TokenLoraProcessor({}, region_deltas) for region_deltas in deltas]
    return _mixed_by_masks(backbone, bank, request, {}, processors)


@torch.no_grad()
def couple(backbone: Backbone, bank: ConceptBank, request: Request) -> Tensor:
    settings, count = request.settings, len(request.seeds)
    latents = starting_noise(backbone, request.seeds, settings.size).to(backbone.device)
    rows, size = guidance_rows(backbone, count, settings.cfg), (latents.shape[-2], latents.shape[-1])
    negative = encode(backbone, bank, [settings.negative])

    def part(text: str) -> Part:
        return Part(Context.cat([negative, encode(backbone, bank, [text])]), {})

    with backbone.folded(_all_deltas(backbone, bank, request)):
        scene, parts = part(request.scene), [part(region.prompt) for region in request.regions]
        processor = RegionProcessor(backbone, scene, request.regions, parts, rows, size)
        negatives, positives = (repeated(scene.context[half:half + 1], count) for half in (0, 1))

        def estimate(x: Tensor, t: int, _progress: float) -> Tensor:
            return guided(backbone, x, t, negatives, positives, settings.cfg, processor)

        latents = denoise(solver_for(backbone.schedule, settings.steps), latents, estimate)
        return backbone.decode_latents(latents)


WAYS: dict[str, Callable[[Backbone, ConceptBank, Request], Tensor]] = {
    "ours": ours, "one_pass": one_pass, "feathered": feathered, "found": found, "prompt": prompt,
    "masked": masked, "hooks": hooks, "couple": couple,
}

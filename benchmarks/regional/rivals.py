"""Ways to have several concepts in one picture, each with the same wish: ours in a few forms, and what people do today.

`prompt`: one prompt that names all. `masked`: ComfyUI's masked conditioning, every region's prompt predicted over the whole frame and
the noises mixed by masks, all concepts' deltas loaded at once. `hooks`: the same with each concept's deltas in its own prediction alone
(LoRA hooks); one evaluation per region and step, as `masked`. `couple`: Attention Couple, one evaluation, every region with keys and values
of its own prompt but the same weights, all deltas loaded at once.
"""

from __future__ import annotations

from collections.abc import Callable
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
from ...core.model.solver import DpmSolver, denoise, guided
from ...core.regional.noise import NoiseSettings, region_noise
from ...core.regional.processor import Part, RegionProcessor
from ...core.regional.regions import Region, masks_of
from ...core.sampling.found import sample_found
from ...core.sampling.regions import sample_regions
from ...core.sampling.sampling import encode, sample, starting_noise
from ...core.sampling.settings import SampleSettings

CROP_DENOISING = 0.7      # the embedded base knows pictures of one size alone: what is settled before it sees a larger frame stays settled
ISOLATION = 1.0
FEATHER = 0.1
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Wish:
    """Concepts `names`, each in its own of `boxes`, somewhere: one picture per seed, of the settings' size."""

    names: tuple[str, ...]
    boxes: tuple[Box, ...]
    place: str
    seeds: tuple[int, ...]
    settings: SampleSettings
    feather: float = 0.0

    @property
    def regions(self) -> list[Region]:
        texts = [f"a photo of <{name}> {self.place}" for name in self.names]
        return [Region(text, box, feather=self.feather) for text, box in zip(texts, self.boxes, strict=True)]

    @property
    def scene(self) -> str:
        return f"a photo {self.place}"

    @property
    def listed(self) -> str:
        words = [f"<{name}>" for name in self.names]
        return f"a photo of {' and '.join([', '.join(words[:-1]), words[-1]]) if words[1:] else words[0]} {self.place}"


def ours(backbone: Backbone, bank: ConceptBank, wish: Wish) -> Tensor:
    settings = replace(wish.settings, noise=NoiseSettings(crop_denoising=CROP_DENOISING), isolation=ISOLATION)
    return sample_regions(backbone, bank, wish.scene, wish.regions, wish.seeds, settings)


def one_pass(backbone: Backbone, bank: ConceptBank, wish: Wish) -> Tensor:
    """Ours without solo steps and isolation: region attention alone."""
    return sample_regions(backbone, bank, wish.scene, wish.regions, wish.seeds, wish.settings)


def feathered(backbone: Backbone, bank: ConceptBank, wish: Wish) -> Tensor:
    """Ours with soft edges."""
    return ours(backbone, bank, replace(wish, feather=FEATHER))


def found(backbone: Backbone, bank: ConceptBank, wish: Wish) -> Tensor:
    """Ours without boxes: the prompt of `prompt`, every concept kept to where it is found."""
    return sample_found(backbone, bank, wish.listed, wish.seeds, wish.settings)


def prompt(backbone: Backbone, bank: ConceptBank, wish: Wish) -> Tensor:
    return sample(backbone, bank, [wish.listed] * len(wish.seeds), wish.seeds, wish.settings)


def _all_at_once(backbone: Backbone, bank: ConceptBank, wish: Wish) -> Deltas:
    return aggregate(backbone, bank, bank.parse(wish.listed)).deltas


def _halves(backbone: Backbone, bank: ConceptBank, text: str, settings: SampleSettings, count: int = 1) -> tuple[Context, Context]:
    return tuple(Context.cat([encode(backbone, bank, [words])] * count) for words in (settings.negative, text))


def _by_masks(backbone: Backbone, bank: ConceptBank, wish: Wish, loaded: Deltas, processors: list[AttentionProcessor | None]) -> Tensor:
    """Every region's prompt over the whole frame, noises mixed by masks."""
    contexts = [_halves(backbone, bank, region.prompt, wish.settings, len(wish.seeds)) for region in wish.regions]
    latents = starting_noise(backbone, wish.seeds, wish.settings.size).to(backbone.device)
    masks = masks_of(wish.regions, *latents.shape[-2:])

    def estimate(x: Tensor, t: int, _progress: float) -> Tensor:
        each = [guided(backbone, x, t, *context, wish.settings.cfg, processor)
                for context, processor in zip(contexts, processors, strict=True)]
        return region_noise(torch.zeros_like(x), torch.stack(each), masks, 0.0)

    with backbone.folded(loaded):
        return backbone.decode_latents(denoise(DpmSolver(backbone.schedule, wish.settings.steps), latents, estimate))


@torch.no_grad()
def masked(backbone: Backbone, bank: ConceptBank, wish: Wish) -> Tensor:
    return _by_masks(backbone, bank, wish, _all_at_once(backbone, bank, wish), [None] * len(wish.names))


@torch.no_grad()
def hooks(backbone: Backbone, bank: ConceptBank, wish: Wish) -> Tensor:
    deltas = [aggregate(backbone, bank, bank.parse(region.prompt)).deltas for region in wish.regions]
    return _by_masks(backbone, bank, wish, {}, [TokenLoraProcessor({}, own) for own in deltas])


@torch.no_grad()
def couple(backbone: Backbone, bank: ConceptBank, wish: Wish) -> Tensor:
    settings, count = wish.settings, len(wish.seeds)
    latents = starting_noise(backbone, wish.seeds, settings.size).to(backbone.device)
    scene = _halves(backbone, bank, wish.scene, settings)
    rows = torch.tensor([0] * count + [1] * count, device=backbone.device)
    with backbone.folded(_all_at_once(backbone, bank, wish)):
        parts = [Part(Context.cat(list(_halves(backbone, bank, region.prompt, settings))), {}) for region in wish.regions]
        processor = RegionProcessor(backbone, Part(Context.cat(list(scene)), {}), wish.regions, parts, rows, tuple(latents.shape[-2:]))
        negative, positive = (Context.cat([half] * count) for half in scene)

        def estimate(x: Tensor, t: int, _progress: float) -> Tensor:
            return guided(backbone, x, t, negative, positive, settings.cfg, processor)

        return backbone.decode_latents(denoise(DpmSolver(backbone.schedule, settings.steps), latents, estimate))


WAYS: dict[str, Callable[[Backbone, ConceptBank, Wish], Tensor]] = {
    "ours": ours, "one_pass": one_pass, "feathered": feathered, "found": found, "prompt": prompt, "masked": masked, "hooks": hooks,
    "couple": couple,
}

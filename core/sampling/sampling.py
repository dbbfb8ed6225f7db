"""Pictures from prompts: classifier-free guidance with DPM-Solver++ (CIDM's protocol), bank and regions included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..attention.token_lora import TokenLoraProcessor
from ..bank.bank import ConceptBank
from ..bank.prompts import named_concepts
from ..conditioning.encoding import encode_prompts, text_positions
from ..conditioning.routing import aggregate, averaged_names, token_lora_deltas
from ..errors import ConceptError
from ..model.backbone import AttentionProcessor, Backbone, Context
from ..model.deltas import Deltas
from ..regional.found import FoundRegions, prompts_apart
from ..regional.noise import NoiseSettings, Window, region_noise, scene_is_seen, windows_of
from ..regional.processor import DeltaAndTokenLoraProcessor, Part, RegionProcessor
from ..regional.regions import OVERLAPS, Region, masks_of, pooled_of
from .attention_guidance import Artists, Subject


@dataclass(frozen=True)
class SampleSettings:
    """steps of DPM-Solver++ (2M); cfg: guidance scale, 1 = none; size: picture height and width in pixels; mode and strength: see routing;
    noise: region noise estimation and solo steps; overlap: as in regional.regions.shares; isolation: share of the first steps
    in which regions do not see each other in self-attention; artists: strength of regional.artists for
    prompts that name two concepts or more, 0 = none; with regions they have nothing to do."""

    steps: int = 25
    cfg: float = 7.5
    size: tuple[int, int] = (512, 512)
    negative: str = ""
    mode: str = "sharp"
    strength: float = 1.0
    noise: NoiseSettings = NoiseSettings()
    overlap: str = "average"
    isolation: float = 0.0
    batch: int = 16
    artists: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.cfg < 0:
            raise ConceptError(f"steps and cfg are {self.steps} and {self.cfg}; allowed: steps 1 or more, cfg 0 or more")
        if self.batch < 1 or self.overlap not in OVERLAPS:
            raise ConceptError(f"batch and overlap are {self.batch} and {self.overlap!r}; allowed: 1 or more, {', '.join(OVERLAPS)}")
        if not 0 <= self.isolation <= 1:
            raise ConceptError(f"isolation is {self.isolation}; allowed: 0 to 1, a share of the steps")
        if not 0 <= self.artists < float("inf"):
            raise ConceptError(f"the artists' strength is {self.artists}; allowed: 0 or more")


def _scheduler(backbone: Backbone, steps: int):
    from diffusers import DPMSolverMultistepScheduler

    alphas = backbone.schedule.alphas_cumprod.double()
    betas = 1 - alphas / torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    scheduler = DPMSolverMultistepScheduler(trained_betas=betas.numpy(), num_train_timesteps=len(alphas), prediction_type="epsilon",
                                            algorithm_type="dpmsolver++", solver_order=2)
    scheduler.set_timesteps(steps)
    return scheduler


def starting_noise(backbone: Backbone, seeds: Sequence[int], size: tuple[int, int]) -> Tensor:
    """`[B, C, h, w]`, one generator per seed: a seed's picture does not depend on the batch it is in."""
    multiple = backbone.picture_multiple
    if any(side < multiple or side % multiple for side in size):
        raise ConceptError(f"the picture's size is {size[0]}x{size[1]}; both sides must be multiples of {multiple}")
    shape = (backbone.latent_channels, size[0] // multiple, size[1] // multiple)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def encode(backbone: Backbone, bank: ConceptBank, prompts: Sequence[str], chunks: int = 1) -> Context:
    """Prompts that may name the bank's concepts, as one batch."""
    named = {name for prompt in prompts for name in named_concepts(bank.vocabulary.parse(prompt))}
    return encode_prompts(backbone, prompts, bank.vocabulary, {name: bank[name].tokens for name in named}, chunks)


def guided(backbone: Backbone, latents: Tensor, t: int, negative: Context, positive: Context, cfg: float,
            processor: AttentionProcessor | None) -> Tensor:
    """Guided noise estimate: negative + cfg (positive - negative), both halves in one UNet evaluation."""
    timesteps = torch.full((len(latents),), t, device=latents.device, dtype=torch.long)
    if cfg == 1.0:
        return backbone.schedule.to_epsilon(backbone.predict(latents, timesteps, positive, processor), latents, timesteps)
    context = Context.cat([negative, positive])
    output = backbone.predict(torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), context, processor)
    estimate = backbone.schedule.to_epsilon(output, torch.cat([latents, latents]), torch.cat([timesteps, timesteps]))
    unconditional, conditional = estimate.chunk(2)
    return unconditional + cfg * (conditional - unconditional)


def _repeat(context: Context, count: int) -> Context:
    return Context.cat([context] * count)


def denoise(backbone: Backbone, latents: Tensor, steps: int, estimate, move=None) -> Tensor:
    """Runs the solver; `estimate(latents, t, progress)` gives the guided noise, `move` with the same arguments other latents before it."""
    scheduler = _scheduler(backbone, steps)
    for i, t in enumerate(scheduler.timesteps.tolist()):
        progress = i / max(1, steps - 1)
        latents = latents if move is None else move(latents, t, progress)
        noise = estimate(latents, t, progress)
        latents = scheduler.step(noise, t, latents, return_dict=False)[0]
    return latents


def _mover(backbone: Backbone, bank: ConceptBank, prompts: Sequence[str], positive: Context, strength: float,
           processors: Sequence[AttentionProcessor | None]):
    """The attention artists as what moves latents (the mean over an average's programs); None where there is nothing for them to do."""
    texts = [text_positions(backbone, prompt, bank.vocabulary) for prompt in prompts]
    subjects = [Subject(tuple(words.values()), text) for words, text in zip(positive.words, texts, strict=True)]
    artists = [Artists(subjects, strength) for _ in processors]
    if not artists[0].works(0.0):
        return None

    def move(x: Tensor, t: int, progress: float) -> Tensor:
        def look(latents: Tensor, processor: AttentionProcessor) -> Tensor:
            return backbone.predict(latents, torch.full((len(latents),), t, device=latents.device), positive, processor)

        if not artists[0].works(progress):
            return x
        return torch.stack([artist.moved(x, look, processor) for artist, processor in zip(artists, processors, strict=True)]).mean(0)

    return move


def _on_device(backbone: Backbone, deltas: Deltas) -> Deltas:
    return {key: delta.to(backbone.device) for key, delta in deltas.items()}


def _bound(backbone: Backbone, bank: ConceptBank, prompts: Sequence[str], settings: SampleSettings) -> dict[str, Deltas]:
    """Deltas of the bound concepts that the prompts name."""
    named = {name for prompt in prompts for name in named_concepts(bank.vocabulary.parse(prompt))}
    return {name: _on_device(backbone, deltas) for name, deltas in token_lora_deltas(bank, settings.strength, named).items()}


def _processors(backbone: Backbone, bank: ConceptBank, prompts: Sequence[str], settings: SampleSettings,
              averaged: Sequence[str]) -> list[AttentionProcessor | None]:
    """What the sites do beside their folded weights: one program, or one per averaged concept's model; bound concepts are in each."""
    bound = _bound(backbone, bank, prompts, settings)
    models = [DeltaAndTokenLoraProcessor(_on_device(backbone, bank[name].deltas), bound) for name in averaged]
    return models or [TokenLoraProcessor(bound) if bound else None]


def _sample_group(backbone: Backbone, bank: ConceptBank, prompts: list[str], seeds: list[int], settings: SampleSettings) -> Tensor:
    """Prompts that share their deltas: folded once, no cost per step; averages of predictions cost one evaluation per concept."""
    averaged = averaged_names(bank)
    deltas = aggregate(backbone, bank, prompts[0], settings.mode, settings.strength, without=averaged).deltas
    processors = _processors(backbone, bank, prompts, settings, averaged)
    pictures = []
    with backbone.folded(deltas):
        for start in range(0, len(prompts), settings.batch):
            chunk = slice(start, start + settings.batch)
            positive = encode(backbone, bank, prompts[chunk])
            negative = _repeat(encode(backbone, bank, [settings.negative]), len(positive))
            latents = starting_noise(backbone, seeds[chunk], settings.size).to(backbone.device)

            def estimate(x: Tensor, t: int, _progress: float, negative: Context = negative, positive: Context = positive) -> Tensor:
                every = [guided(backbone, x, t, negative, positive, settings.cfg, processor) for processor in processors]
                return every[0] if len(every) == 1 else torch.stack(every).mean(0)

            move = _mover(backbone, bank, prompts[chunk], positive, settings.artists, processors) if settings.artists else None
            pictures.append(backbone.decode_latents(denoise(backbone, latents, settings.steps, estimate, move)))
    return torch.cat(pictures)


@torch.inference_mode(False)      # weights folded under it would let no gradient of the artists pass
@torch.no_grad()
def sample(backbone: Backbone, bank: ConceptBank, prompts: Sequence[str], seeds: Sequence[int], settings: SampleSettings) -> Tensor:
    """One picture per prompt and seed, `[B, 3, H, W]` in -1..1. Prompts that ask for the same deltas run together."""
    if len(prompts) != len(seeds) or not prompts:
        raise ConceptError(f"there are {len(prompts)} prompts and {len(seeds)} seeds; one seed per prompt is needed, one or more")
    groups: dict[tuple, list[int]] = {}
    for i, prompt in enumerate(prompts):
        named = tuple(sorted(named_concepts(bank.vocabulary.parse(prompt))))
        groups.setdefault(named if settings.mode in ("sharp", "equal") else (prompt,), []).append(i)
    result: list[Tensor | None] = [None] * len(prompts)
    for members in groups.values():
        pictures = _sample_group(backbone, bank, [prompts[i] for i in members], [seeds[i] for i in members], settings)
        for i, picture in zip(members, pictures, strict=True):
            result[i] = picture
    return torch.stack(result)


def _part(backbone: Backbone, bank: ConceptBank, prompt: str, negative: str, settings: SampleSettings) -> Part:
    own = aggregate(backbone, bank, prompt, settings.mode, settings.strength, always_on=False).deltas
    context = Context.cat([encode(backbone, bank, [negative]), encode(backbone, bank, [prompt])])
    bound = _bound(backbone, bank, [prompt, negative], settings)
    return Part(context, _on_device(backbone, own), bound)      # moved once, not in every step


def _rows(backbone: Backbone, count: int, cfg: float) -> Tensor:
    """Of the UNet's batch: 0 = the negative half of guidance, 1 = the positive one."""
    return torch.tensor([1] * count if cfg == 1.0 else [0] * count + [1] * count, device=backbone.device)


class _RegionSampling:
    """One sampling with regions: parts encoded once, a program for the whole, and each region's own estimate where that is asked for."""

    def __init__(self, backbone: Backbone, bank: ConceptBank, scene: str, regions: Sequence[Region], count: int, settings: SampleSettings,
                 latent: tuple[int, int]) -> None:
        self.backbone, self.bank, self.regions, self.count, self.settings = backbone, bank, list(regions), count, settings
        self.parts = [_part(backbone, bank, region.prompt, region.negative or settings.negative, settings) for region in regions]
        self.whole = self._with_pooled(_part(backbone, bank, scene, settings.negative, settings), latent)
        rows = _rows(backbone, count, settings.cfg)
        self.processor = RegionProcessor(backbone, self.whole, self.regions, self.parts, rows, latent, settings.overlap, settings.isolation)
        self.soft, self.hard = (masks_of(self.regions, *latent, feathered).to(backbone.device) for feathered in (True, False))

    def _with_pooled(self, scene: Part, latent: tuple[int, int]) -> Part:
        if scene.context.pooled is None:
            return scene
        pooled = pooled_of(self.regions, scene.context.pooled, [p.context.pooled for p in self.parts], latent, self.settings.overlap)
        return replace(scene, context=replace(scene.context, pooled=pooled))

    def _guided(self, x: Tensor, t: int, one: Part, sites: AttentionProcessor) -> Tensor:
        negative, positive = (_repeat(one.context[i:i + 1], self.count) for i in (0, 1))
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
def sample_regions(backbone: Backbone, bank: ConceptBank, scene: str, regions: Sequence[Region], seeds: Sequence[int],
                   settings: SampleSettings) -> Tensor:
    """Pictures of a scene prompt with regions: region attention, and region noise estimation and solo steps as `settings.noise` says.

    One UNet evaluation per step for any number of regions. With region noise one more for every region that is on, over the full frame
    (the paper's form) or on its window (`area="crop"`); in solo steps windows alone, and the frame only where the scene is seen.
    """
    if not regions:
        return sample(backbone, bank, [scene] * len(seeds), seeds, settings)
    always = aggregate(backbone, bank, "", strength=0.0).deltas      # with what stands for an average, see there
    with backbone.folded(always):
        latents = starting_noise(backbone, seeds, settings.size).to(backbone.device)
        run = _RegionSampling(backbone, bank, scene, regions, len(seeds), settings, tuple(latents.shape[-2:]))
        return backbone.decode_latents(denoise(backbone, latents, settings.steps, run.estimate))


@torch.no_grad()
def sample_found(backbone: Backbone, bank: ConceptBank, scene: str, seeds: Sequence[int], settings: SampleSettings) -> Tensor:
    """Pictures of a prompt that names two concepts or more, each kept to where it is found (regional.found); of any other as `sample`."""
    texts, count = prompts_apart(bank, scene), len(seeds)
    if len(texts) < 2:
        return sample(backbone, bank, [scene] * count, seeds, settings)
    with backbone.folded(aggregate(backbone, bank, "", strength=0.0).deltas):
        latents = starting_noise(backbone, seeds, settings.size).to(backbone.device)
        whole, *parts = (_part(backbone, bank, text, settings.negative, settings) for text in (scene, *texts.values()))
        words = [whole.context.words[1][name] for name in texts]
        rows = _rows(backbone, count, settings.cfg)
        processor = FoundRegions(backbone, whole, list(texts), parts, words, rows, tuple(latents.shape[-2:]))
        negative, positive = (_repeat(whole.context[i:i + 1], count) for i in (0, 1))

        def estimate(x: Tensor, t: int, progress: float) -> Tensor:
            processor.progress = progress
            return guided(backbone, x, t, negative, positive, settings.cfg, processor)

        return backbone.decode_latents(denoise(backbone, latents, settings.steps, estimate))

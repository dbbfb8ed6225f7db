"""MODELs that sample with regions: drawn, or found on the way; region noise, solo steps, SDXL's pooled
text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import comfy.model_base
import torch
from torch import Tensor

from ..model.backbone import Context
from ..model.deltas import Deltas
from ..regional.crop_processor import CropProcessor
from ..regional.found import FoundRegions
from ..regional.noise import NoiseSettings
from ..regional.observe import ObservedRegions
from ..regional.processor import Part, RegionProcessor
from ..regional.regions import Region, pooled_of
from ..sampling.denoise import RegionSteps
from .apply import KEY, Wrappers, progress_of, with_processor
from .sites import UNetSites
from .token_lora import TokenLoraRun


@dataclass
class RegionRun:
    """State of one sampling with regions: programs are built at the first UNet call, when weights are on
    their device.

    parts: per region its context of two rows (negative, positive) and its deltas.
    """

    sites: UNetSites
    scene: Part
    regions: Sequence[Region]
    parts: Sequence[Part]
    words: Sequence[tuple[int, ...]]     # per region the token positions that the picture of the attention looks at
    bound: Mapping[str, Deltas] = field(default_factory=dict)      # concepts that act through their words, in the scene's prompt too
    overlap: str = "average"
    isolation: float = 0.0
    alone: tuple[int, ...] | None = None     # regions that are evaluated alone now, one after another in the batch
    _processors: dict = field(default_factory=dict)
    _rows: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._scene = TokenLoraRun(self.bound)

    def __call__(self, options: dict, x: Tensor) -> RegionProcessor | CropProcessor:
        which = options["cond_or_uncond"]
        key = tuple(x.shape[-2:]) if self.alone is None else ("apart", self.alone)
        if key not in self._processors:
            self._processors[key] = self._build(x) if self.alone is None else self._build_apart(x)
        processor = self._processors[key]
        processor.scene_concepts = self._scene.concepts(options, x)
        if self.alone is not None:
            processor.take([1 - kind for kind in which], len(x))
            return processor
        processor.rows, processor.progress = self._row_of(tuple(which), x), progress_of(options)
        processor.is_observing = processor.progress == 1.0 and 0 in which
        return processor

    def _row_of(self, which: tuple[int, ...], x: Tensor) -> Tensor:
        """The same tensor for calls of one kind: by it programs know what they have laid out already."""
        key = which, x.shape[0], str(x.device)
        if key not in self._rows:
            self._rows[key] = torch.tensor([1 - kind for kind in which], device=x.device).repeat_interleave(x.shape[0] // len(which))
        return self._rows[key]

    def pooled(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """Every region's pooled text, of its negative and its prompt `[1, P]`, None where the model has
        none."""
        found = [part.context.pooled for part in self.parts]
        return [(None, None) if rows is None else (rows[:1], rows[1:2]) for rows in found]

    def maps(self, size: tuple[int, int]) -> Tensor:
        """Attention per region in the last step, `[U, H, W]` in 0..1."""
        seen = [processor for processor in self._processors.values() if not isinstance(processor, CropProcessor)]
        return seen[-1].picture_maps(size) if seen else torch.zeros(len(self.regions), *size)

    def _moved(self, x: Tensor) -> tuple[Part, list[Part]]:
        """The scene and the parts where the latent is."""
        used = {name for part in self.parts for words in part.context.words for name in words}
        bound = {name: {key: delta.to(x.device) for key, delta in self.bound[name].items()} for name in used}
        parts = [Part(Context(part.context.hidden.to(x.device, x.dtype), None, part.context.words),
                      {key: delta.to(x.device) for key, delta in part.deltas.items()}, bound) for part in self.parts]
        return Part(self.scene.context, {key: delta.to(x.device) for key, delta in self.scene.deltas.items()}), parts

    def _build(self, x: Tensor) -> RegionProcessor:
        scene, parts = self._moved(x)
        nobody = torch.zeros(1, dtype=torch.long)
        return ObservedRegions(self.sites, scene, list(self.regions), parts, nobody, tuple(x.shape[-2:]), self.overlap, self.isolation,
                               tokens=list(self.words))

    def _build_apart(self, x: Tensor) -> CropProcessor:
        scene, parts = self._moved(x)
        return CropProcessor(self.sites, scene, [parts[u] for u in self.alone])


class FoundRun(RegionRun):
    """A sampling whose regions are found on the way, see regional.found. regions: one for each concept, over
    everything; words: where its words are in the scene's prompt; parts: its own prompt."""

    def _build(self, x: Tensor) -> RegionProcessor:
        scene, parts = self._moved(x)
        names, nobody = [region.prompt for region in self.regions], torch.zeros(1, dtype=torch.long)
        return FoundRegions(self.sites, scene, names, parts, self.words, nobody, tuple(x.shape[-2:]))

    def found(self) -> Tensor | None:
        """Masks of the first picture's regions `[U, h, w]`; None before they are found."""
        masks = [processor.found for processor in self._processors.values() if processor.found is not None]
        return masks[-1][:, 0] if masks else None


def with_regions(model, run: RegionRun, noise: NoiseSettings):
    """A clone of MODEL that samples with regions: one evaluation per step; region noise and solo steps look
    at more, see regional.noise."""
    clone = with_processor(model, run.sites, run, self_attention=run.isolation > 0)
    if noise.is_on or noise.crop_denoising > 0:
        clone.add_wrapper_with_key(Wrappers.PREDICT_NOISE, KEY, _RegionSteps(run, noise))
        clone.add_wrapper_with_key(Wrappers.DIFFUSION_MODEL, f"{KEY}_crops", _CropConditioning(run, model.model))
    return clone


def with_found(model, run: FoundRun):
    """A clone of MODEL for one sampling in which concepts are kept to where they are found."""
    return with_processor(model, run.sites, run)


def with_pooled(conditioning, regions: Sequence[Region], own: Sequence[Tensor | None], latent: tuple[int, int], overlap: str):
    """A CONDITIONING whose pooled text is that of a picture with regions, see regional.regions.pooled_of; as
    it was where a model has none, or another node made more prompts of it."""
    def changed(extra: dict) -> dict:
        pooled = extra.get("pooled_output")
        if pooled is None or any(one is None or one.shape != pooled.shape for one in own):
            return extra
        return {**extra, "pooled_output": pooled_of(regions, pooled, own, latent, overlap)}

    return [[hidden, changed(extra)] for hidden, extra in conditioning]


_AFTER = "sampler_post_cfg_function"      # ComfyUI's name for functions that are called with the result of guidance
_HALVES = ("cond_denoised", "uncond_denoised")      # what these functions are given beside the result
_PIXELS = 8      # per cell of SDXL's latents, as the host counts the picture's size
_WHOLE_FRAME = ("control", "mask", "area", "gligen", "concat_latent_image")      # of a prompt, for the whole latent alone


def whole_frame_things(model, conditioning: Sequence) -> list[str]:
    """What prompts or the model carry that belongs to the whole frame: crops cannot be evaluated with it."""
    found = {key for _, extra in conditioning for key in _WHOLE_FRAME if key in extra}
    return sorted(found) + ["an inpainting model's picture"] * bool(getattr(model.model, "concat_keys", ()))


class _RegionSteps:
    """ComfyUI's wrapper of a step's prediction: steps in which regions are evaluated alone, see
    sampling.denoise."""

    def __init__(self, run: RegionRun, noise: NoiseSettings) -> None:
        self.run, self.steps = run, RegionSteps(run.regions, noise, run.overlap)

    def __call__(self, executor, x, timestep, model_options=None, seed=None):
        step = self.steps.at(progress_of({**model_options["transformer_options"], "sigmas": timestep}), x)
        if step is None:
            return executor(x, timestep, model_options, seed)
        evaluation = _Evaluation(self.run, executor, x, timestep, model_options, seed)
        return evaluation.after_guidance(step.estimate(x, evaluation))


class _CropConditioning:
    """ComfyUI's wrapper of the UNet's call: SDXL's second conditioning of regions that are evaluated alone.
    As a picture of its own, each reads its own pooled text, and the size of what is evaluated."""

    def __init__(self, run: RegionRun, base) -> None:
        self.run, self.base, self._made = run, base, {}

    def __call__(self, executor, x, timesteps, context, y=None, control=None, transformer_options=None, **kwargs):
        alone = self.run.alone
        if alone is not None and y is not None and isinstance(self.base, comfy.model_base.SDXL):
            y = self._rows(x, transformer_options["cond_or_uncond"], alone).to(y)
        return executor(x, timesteps, context, y, control, transformer_options, **kwargs)

    def _rows(self, x: Tensor, kinds: Sequence[int], alone: tuple[int, ...]) -> Tensor:
        """`[B, P]` for a batch of both kinds of prompts, in each region by region."""
        key = tuple(x.shape), tuple(kinds), alone
        if key not in self._made:
            height, width = (_PIXELS * side for side in x.shape[-2:])
            pooled = [self.run.parts[u].context.pooled[1 - kind:2 - kind] for kind in kinds for u in alone]
            rows = [self.base.encode_adm(pooled_output=row, height=height, width=width, device=x.device) for row in pooled]
            self._made[key] = torch.cat(rows).repeat_interleave(len(x) // len(rows), 0)
        return self._made[key]


class _Evaluation:
    """Guided noise estimates of one step, by the host's names. Functions of other nodes and samplers (CFG++)
    that are called after guidance are called once, with the whole picture, and not for every crop."""

    def __init__(self, run: RegionRun, executor, x: Tensor, timestep: Tensor, model_options: dict, seed) -> None:
        self.run, self.executor, self.x, self.timestep = run, executor, x, timestep
        self.options, self.seed = model_options, seed
        self.functions, self.args = list(model_options.get(_AFTER, [])), {}

    def _keep(self, args: dict) -> Tensor:
        self.args = args
        return args["denoised"]

    def __call__(self, latents: Tensor, regions: tuple[int, ...] | None) -> dict[str, Tensor]:
        """The host predicts denoised pictures, x - sigma * noise, over any number of copies of the batch."""
        options = {**self.options, _AFTER: [self._keep]} if self.functions else self.options
        timestep = self.timestep.repeat(len(latents) // len(self.x))
        self.run.alone = regions
        try:
            found = {"denoised": self.executor(latents, timestep, options, self.seed)}
        finally:
            self.run.alone = None
        found |= {name: self.args[name] for name in _HALVES if torch.is_tensor(self.args.get(name))}
        return {name: (latents - picture) / _by_picture(timestep, latents) for name, picture in found.items()}

    def after_guidance(self, noises: dict[str, Tensor]) -> Tensor:
        """The denoised picture of mixed noise estimates, after the functions of others."""
        pictures = {name: self.x - _by_picture(self.timestep, self.x) * noise for name, noise in noises.items()}
        args = {**self.args, **pictures, "input": self.x, "sigma": self.timestep, "model_options": self.options}
        for function in self.functions:
            args["denoised"] = function(args)
        return args["denoised"]


def _by_picture(values: Tensor, latents: Tensor) -> Tensor:
    """One value for each picture `[B]`, to be multiplied with latents `[B, ...]`."""
    return values.view(-1, *[1] * (latents.ndim - 1))

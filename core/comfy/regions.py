"""MODELs with drawn or found regions, region noise, crop denoising and SDXL's pooled text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_base
import torch
from torch import Tensor

from ..regional.noise import NoiseSettings
from ..regional.regions import Region, pooled_of
from ..sampling.denoise import RegionSteps
from .apply import KEY, Wrappers, progress_of, with_processor
from .region_run import FoundRun, RegionRun

Conditioning = list[list[Any]]      # ComfyUI's CONDITIONING: pairs of a tensor and a dictionary

_AFTER = "sampler_post_cfg_function"      # ComfyUI's name for functions that are called after guidance
_HALVES = ("cond_denoised", "uncond_denoised")      # their arguments besides the result
_PIXELS = 8      # pixels per cell of SDXL's latents, for ComfyUI's picture size
_WHOLE_FRAME = ("control", "mask", "area", "gligen", "concat_latent_image")      # do not apply to crops


def with_regions(model, run: RegionRun, noise: NoiseSettings):
    """Returns a clone of MODEL that samples with regions, with one evaluation per step. `noise` adds other
    steps, see sampling.denoise.
    """
    clone = with_processor(model, run.sites, run, self_attention=run.isolation > 0)
    if noise.is_on or noise.crop_denoising > 0:
        clone.add_wrapper_with_key(Wrappers.PREDICT_NOISE, KEY, _RegionSteps(run, noise))
        conditioning = _CropConditioning(run, model.model)
        clone.add_wrapper_with_key(Wrappers.DIFFUSION_MODEL, f"{KEY}_crops", conditioning)
    return clone


def with_found(model, run: FoundRun):
    """Returns a clone of MODEL for one sampling that restricts concepts to the regions where they are found.
    """
    return with_processor(model, run.sites, run)


def with_pooled(conditioning: Conditioning, regions: Sequence[Region], own: Sequence[Tensor | None],
                latent: tuple[int, int], overlap: str) -> Conditioning:
    """Returns a CONDITIONING with the pooled text of a picture with regions, see regional.regions.pooled_of.

    Returns it unchanged if the model has no pooled text, or if another node has split the prompt into
    several.

    Args:
        own: The regions' pooled texts, `[1, P]` each.
        latent: Height and width of the latents.
    """
    def changed(extra: dict) -> dict:
        pooled = extra.get("pooled_output")
        if pooled is None:
            return extra
        fitting = [rows for rows in own if rows is not None and rows.shape == pooled.shape]
        if len(fitting) < len(own):
            return extra
        return {**extra, "pooled_output": pooled_of(regions, pooled, fitting, latent, overlap)}

    return [[hidden, changed(extra)] for hidden, extra in conditioning]


def whole_frame_things(model, conditioning: Sequence) -> list[str]:
    """Names the parts of prompts or model, such as ControlNet, that only fit the whole frame. Crops cannot be
    evaluated with these.
    """
    carried = {key for _, extra in conditioning for key in _WHOLE_FRAME if key in extra}
    reads_picture = model.model.diffusion_model.in_channels > model.model.latent_format.latent_channels
    return sorted(carried) + ["an inpainting model's picture"] * reads_picture


class _RegionSteps:
    """ComfyUI wrapper around a step's prediction that evaluates regions alone in some steps, see
    sampling.denoise.
    """

    def __init__(self, run: RegionRun, noise: NoiseSettings) -> None:
        self.run, self.steps = run, RegionSteps(run.regions, noise, run.overlap)

    def __call__(self, executor, x, timestep, model_options=None, seed=None):
        step = self.steps.at(progress_of({**model_options["transformer_options"], "sigmas": timestep}), x)
        if step is None:
            return executor(x, timestep, model_options, seed)
        evaluation = _Evaluation(self.run, executor, x, timestep, model_options, seed)
        return evaluation.after_guidance(step.estimate(x, evaluation))


class _CropConditioning:
    """ComfyUI wrapper around the UNet call with SDXL's vector conditioning for regions that are evaluated
    alone. Each region gets its own pooled text and the size of its crop or frame.
    """

    def __init__(self, run: RegionRun, base) -> None:
        self.run, self.base = run, base
        self._made: dict[tuple, Tensor] = {}

    def __call__(self, executor, x, timesteps, context, y=None, control=None, transformer_options=None,
                 **kwargs):
        alone = self.run.alone
        if alone is not None and y is not None and isinstance(self.base, comfy.model_base.SDXL):
            y = self._rows(x, transformer_options["cond_or_uncond"], alone).to(y)
        return executor(x, timesteps, context, y, control, transformer_options, **kwargs)

    def _rows(self, x: Tensor, kinds: Sequence[int], alone: tuple[int, ...]) -> Tensor:
        """Pooled texts `[B, P]` of a batch, by half of guidance, then by region."""
        key = tuple(x.shape), tuple(kinds), alone
        if key not in self._made:
            height, width = (_PIXELS * side for side in x.shape[-2:])
            pooled = {kind: self.run.pooled(1 - kind) for kind in kinds}
            size = {"height": height, "width": width, "device": x.device}
            rows = [self.base.encode_adm(pooled_output=pooled[kind][u], **size)
                    for kind in kinds for u in alone]
            self._made[key] = torch.cat(rows).repeat_interleave(len(x) // len(rows), 0)
        return self._made[key]


class _Evaluation:
    """Guided noise estimates of one step, under the host's names. Post-guidance functions of other nodes and
    samplers (CFG++) are called once per step, with the whole picture, not per crop.
    """

    def __init__(self, run: RegionRun, executor, x: Tensor, timestep: Tensor, model_options: dict,
                 seed) -> None:
        self.run, self.executor, self.x, self.timestep = run, executor, x, timestep
        self.options, self.seed = model_options, seed
        self.functions = list(model_options.get(_AFTER, []))
        self.args: dict[str, Any] = {}      # arguments of these functions, from the host

    def _keep(self, args: dict) -> Tensor:
        self.args = args
        return args["denoised"]

    def __call__(self, latents: Tensor, regions: tuple[int, ...] | None) -> dict[str, Tensor]:
        """Converts the host's denoised predictions, x - sigma * noise, into noise estimates. Latents may hold
        several copies of the batch.
        """
        options = {**self.options, _AFTER: [self._keep]} if self.functions else self.options
        timestep = self.timestep.repeat(len(latents) // len(self.x))
        self.run.alone = regions
        try:
            pictures = {"denoised": self.executor(latents, timestep, options, self.seed)}
        finally:
            self.run.alone = None
        pictures |= {name: self.args[name] for name in _HALVES if torch.is_tensor(self.args.get(name))}
        sigma = _by_picture(timestep, latents)
        return {name: (latents - picture) / sigma for name, picture in pictures.items()}

    def after_guidance(self, noises: dict[str, Tensor]) -> Tensor:
        """Converts mixed noise estimates into the denoised picture and applies post-guidance functions."""
        sigma = _by_picture(self.timestep, self.x)
        pictures = {name: self.x - sigma * noise for name, noise in noises.items()}
        given = {"input": self.x, "sigma": self.timestep, "model_options": self.options}
        args = {**self.args, **pictures, **given}
        for function in self.functions:
            args["denoised"] = function(args)
        return args["denoised"]


def _by_picture(values: Tensor, latents: Tensor) -> Tensor:
    """Reshapes one value per picture, `[B]`, to `[B, 1, 1, 1]` for latents `[B, C, h, w]`."""
    return values.view(-1, *[1] * (latents.ndim - 1))

"""MODELs with drawn or found regions, region noise, crop denoising and SDXL's pooled text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import ConceptError
from ..regional.noise import NoiseSettings
from ..regional.regions import Region, pooled_of
from ..sampling.denoise import RegionSteps
from .apply import KEY, Wrappers, with_processor
from .concept_tokenizer import log
from .families.base import Family
from .prompt_marks import MARKS, is_marked
from .region_run import EVALUATED, Evaluated, FoundRun, RegionRun
from .sites import progress_of

_CROPS = f"{KEY}_crops"
_PIXELS = 8      # pixels per cell of SDXL's latents, for ComfyUI's picture size
_WHOLE_FRAME = ("control", "mask", "area", "gligen", "concat_latent_image")      # do not apply to crops

_log = logging.getLogger(__name__)


def with_regions(model, run: RegionRun, noise: NoiseSettings, tell: Callable[[str], None] = log):
    """Returns a clone of MODEL that samples with regions, with one evaluation per step. Regions act on
    conditionings with a mark, see prompt_marks.

    Args:
        run: Where, when and how regions act.
        noise: Adds other steps, see sampling.denoise.
        tell: Takes a note where crop denoising cannot be used.
    """
    clone = with_processor(model, run.sites, run, self_attention=run.isolation > 0)
    steps = _RegionSteps(run, noise, tell)
    clone.add_wrapper_with_key(Wrappers.OUTER_SAMPLE, KEY, _Sampling(run, steps))
    clone.add_wrapper_with_key(Wrappers.CALC_COND_BATCH, KEY, steps)
    if steps.has_crops and run.sites.reads_pooled:
        clone.add_wrapper_with_key(Wrappers.DIFFUSION_MODEL, _CROPS, _CropConditioning(run, model.model))
    return clone


def with_found(model, run: FoundRun):
    """Returns a clone of MODEL for one sampling that restricts concepts to the regions where they are found.
    """
    clone = with_processor(model, run.sites, run)
    clone.add_wrapper_with_key(Wrappers.OUTER_SAMPLE, KEY, _Sampling(run))
    return clone


def refuse_regions(model) -> None:
    """Raises ConceptError if a MODEL comes from `with_regions`."""
    if model.get_wrappers(Wrappers.CALC_COND_BATCH, KEY):
        raise ConceptError("the model has regions already; connect all regions to one Apply Regions, put "
                           "Apply Concepts before it, and sample with KSampler")


def with_pooled(extra: Mapping, regions: Sequence[Region], own: Sequence[Tensor | None],
                latent: tuple[int, int], overlap: str) -> dict:
    """Returns a conditioning's dictionary with the pooled text of a picture with regions, see
    regional.regions.pooled_of.

    Returns it unchanged if the model has no pooled text, or if another node has split the prompt into
    several.

    Args:
        own: The regions' pooled texts, `[1, P]` each.
        latent: Height and width of the latents.
    """
    pooled = extra.get("pooled_output")
    if pooled is None:
        return dict(extra)
    fitting = [rows for rows in own if rows is not None and rows.shape == pooled.shape]
    if len(fitting) < len(own):
        return dict(extra)
    return {**extra, "pooled_output": pooled_of(regions, pooled, fitting, latent, overlap)}


def whole_frame_things(model_options: Mapping, sites: Family, extras: Iterable[Mapping]) -> list[str]:
    """Names what only fits the whole frame, such as ControlNet. Crops cannot be evaluated with it.

    Args:
        model_options: Of the MODEL.
        sites: The MODEL's sites.
        extras: The dictionaries of the prompts.
    """
    carried = {key for extra in extras for key in _WHOLE_FRAME if key in extra}
    others = sites.has_foreign_self_attention(model_options.get("transformer_options", {}))
    return (sorted(carried) + ["an inpainting model's picture"] * sites.reads_picture
            + ["another node's self-attention"] * others)


class _Sampling:
    """ComfyUI wrapper around a whole sampling with regions."""

    def __init__(self, run: RegionRun, steps: _RegionSteps | None = None) -> None:
        self.run, self.steps = run, steps

    def __call__(self, executor, noise, *args, **kwargs):
        guider = executor.class_obj
        conds = [cond for conds in guider.conds.values() for cond in conds if is_marked([cond])]
        if not conds:
            raise ConceptError("the model has regions, but no conditioning of the node that applied them "
                               "reaches the sampler; connect its outputs positive and negative")
        if self.steps is not None:
            whole = whole_frame_things(guider.model_options, self.run.sites, conds)
            self.steps.begin(whole, guider.model_options)
            for cond in conds:
                pooled = self.run.pooled(cond["model_conds"][MARKS].cond[0])
                size = noise.shape[-2], noise.shape[-1]
                cond.update(with_pooled(cond, self.run.regions, pooled, size, self.run.overlap))
        self.run.begin()
        try:
            return executor(noise, *args, **kwargs)
        finally:
            self.run.end()


class _RegionSteps:
    """ComfyUI wrapper around the predictions of a step, before guidance. It evaluates regions alone in some
    steps, see sampling.denoise.

    Guidance, and other nodes' functions before and after it, therefore see one prediction of the whole
    picture per prompt and step. Other nodes' wrappers around the model's call, which may be caches, see
    frames only.
    """

    def __init__(self, run: RegionRun, noise: NoiseSettings, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.has_crops = noise.is_on or noise.crop_denoising > 0
        self._with_crops = RegionSteps(run.regions, noise, run.overlap)
        self._without_crops = RegionSteps(run.regions, replace(noise, crop_denoising=0.0), run.overlap)
        self._steps = self._with_crops

    def begin(self, whole: Sequence[str], model_options: Mapping) -> None:
        """Begins a sampling. whole: What only fits the whole frame; turns crop denoising off."""
        self._steps = self._without_crops if whole else self._with_crops
        if whole and self._with_crops.noise.crop_denoising > 0:
            self.tell(f"crop denoising is off: the prompt or the model carries {whole[0]}, which belongs to "
                      "the whole picture")
        skipped = _skipped_on_crops(model_options)
        if skipped and self.has_crops:
            _log.info("Regions that are denoised alone bypass other nodes' wrappers of the model: %s.",
                      ", ".join(skipped))

    def __call__(self, executor, model, conds, x, timestep, model_options):
        size = x.shape[-2], x.shape[-1]

        def predicted(latents: Tensor, prompts: list, alone: tuple[int, ...] | None = None) -> list[Tensor]:
            options = _with_evaluated(model_options, Evaluated(size, alone))
            return executor(model, prompts, latents, timestep.repeat(len(latents) // len(x)), options)

        regional = [cond if cond is not None and is_marked(cond) else None for cond in conds]
        progress = progress_of({**model_options["transformer_options"], "sigmas": timestep})
        step = self._steps.at(progress, x) if any(regional) else None
        if step is None:
            return predicted(x, conds)

        # models that also make video have a time axis, here of one frame
        has_time = x.ndim == 5

        def evaluate(latents: Tensor, regions: tuple[int, ...] | None) -> dict[str, Tensor]:
            """Converts denoised predictions, x - sigma * noise, into noise estimates."""
            sigma = _by_picture(timestep.repeat(len(latents) // len(x)), latents)
            framed = latents.unsqueeze(2) if has_time else latents
            return {str(i): (latents - picture.reshape(latents.shape)) / sigma
                    for i, picture in enumerate(predicted(framed, regional, regions)) if regional[i]}

        estimates = step.estimate(x[:, :, 0] if has_time else x, evaluate)
        noises = {name: noise.reshape(x.shape) for name, noise in estimates.items()}
        others = [None if own else cond for cond, own in zip(conds, regional, strict=True)]
        rest = predicted(x, others) if any(others) else [torch.zeros_like(x) for _ in conds]
        sigma = _by_picture(timestep, x)
        return [x - sigma * noises[str(i)] if own else rest[i] for i, own in enumerate(regional)]


def _with_evaluated(model_options: Mapping, evaluated: Evaluated) -> dict:
    """Returns model options that tell the attention processor what is evaluated. For regions alone, other
    nodes' wrappers are left out.
    """
    options = {**model_options, "transformer_options": {**model_options["transformer_options"],
                                                        EVALUATED: evaluated}}
    if evaluated.alone is not None:
        options.pop("model_function_wrapper", None)
        wrappers = dict(options["transformer_options"].get("wrappers", {}))
        for kind in _AROUND_THE_MODEL:
            wrappers[kind] = {key: ours for key, ours in wrappers.get(kind, {}).items() if key in _OURS}
        options["transformer_options"]["wrappers"] = wrappers
    return options


_OURS = (KEY, _CROPS)
_AROUND_THE_MODEL = (Wrappers.APPLY_MODEL, Wrappers.DIFFUSION_MODEL)


def _skipped_on_crops(model_options: Mapping) -> list[str]:
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    keys = {str(key) for kind in _AROUND_THE_MODEL for key, found in wrappers.get(kind, {}).items()
            if found and key not in _OURS}
    return sorted(keys) + ["model_function_wrapper"] * ("model_function_wrapper" in model_options)


class _CropConditioning:
    """ComfyUI wrapper around the denoiser's call with SDXL's vector conditioning, or Flux.1's, for regions
    that are evaluated alone. Each region gets its own pooled text and the size of its crop or frame.
    """

    def __init__(self, run: RegionRun, base) -> None:
        self.run, self.base = run, base
        self._made: dict[tuple, Tensor] = {}

    def __call__(self, executor, x, timesteps, context, y=None, *args, **kwargs):
        options = (args[-1] if args else kwargs.get("transformer_options")) or {}
        evaluated, halves = options.get(EVALUATED), tuple(half for half, _ in options.get(MARKS) or ())
        alone = evaluated.alone if evaluated is not None and halves else None
        if alone is not None and y is not None:
            y = self._rows(x, halves, alone).to(y)
        return executor(x, timesteps, context, y, *args, **kwargs)

    def _rows(self, x: Tensor, halves: tuple[int, ...], alone: tuple[int, ...]) -> Tensor:
        """Pooled texts `[B, P]` of a batch, by half of guidance, then by region."""
        key = tuple(x.shape), halves, alone
        if key not in self._made:
            height, width = (_PIXELS * side for side in x.shape[-2:])
            pooled = {half: self.run.pooled(half) for half in halves}
            size = {"height": height, "width": width, "device": x.device}
            rows = [self.base.encode_adm(pooled_output=pooled[half][u], **size)
                    for half in halves for u in alone]
            self._made[key] = torch.cat(rows).repeat_interleave(len(x) // len(rows), 0)
        return self._made[key]


def _by_picture(values: Tensor, latents: Tensor) -> Tensor:
    """Reshapes one value per picture, `[B]`, to `[B, 1, 1, 1]` for latents `[B, C, h, w]`."""
    return values.view(-1, *[1] * (latents.ndim - 1))

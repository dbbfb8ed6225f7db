"""MODELs that sample with regions: drawn, or found on the way; region noise, solo steps, SDXL's pooled text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..model.backbone import Context
from ..model.deltas import Deltas
from ..regional.crops import RegionsApart
from ..regional.found import FoundRegions
from ..regional.noise import NoiseSettings, Window, region_noise, scene_is_seen, together, windows_of
from ..regional.observe import ObservedRegions
from ..regional.processor import Part, RegionProcessor
from ..regional.regions import Region, masks_of, pooled_of
from .apply import KEY, Wrappers, progress_of, with_processor
from .sites import UNetSites
from .token_lora import BoundRun


@dataclass
class RegionRun:
    """State of one sampling with regions: programs are built at the first UNet call, when weights are on their device.

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
    only: tuple[int, ...] | None = None     # the regions whose own pictures are being estimated, one after another in the batch
    _processors: dict = field(default_factory=dict)
    _rows: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._scene = BoundRun(self.bound)

    def __call__(self, options: dict, x: Tensor) -> RegionProcessor | RegionsApart:
        which = options["cond_or_uncond"]
        key = tuple(x.shape[-2:]) if self.only is None else ("apart", self.only)
        if key not in self._processors:
            self._processors[key] = self._build(x) if self.only is None else self._build_apart(x)
        processor = self._processors[key]
        processor.scene_concepts = self._scene.concepts(options, x)
        if self.only is not None:
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
        """Every region's pooled text, of its negative and its prompt `[1, P]`, None where the model has none."""
        found = [part.context.pooled for part in self.parts]
        return [(None, None) if rows is None else (rows[:1], rows[1:2]) for rows in found]

    def maps(self, size: tuple[int, int]) -> Tensor:
        """Attention per region in the last step, `[U, H, W]` in 0..1."""
        seen = [processor for processor in self._processors.values() if not isinstance(processor, RegionsApart)]
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

    def _build_apart(self, x: Tensor) -> RegionsApart:
        scene, parts = self._moved(x)
        return RegionsApart(self.sites, scene, [parts[u] for u in self.only])


class FoundRun(RegionRun):
    """A sampling whose regions are found on the way, see regional.found. regions: one for each concept, over everything; words: where its
    words are in the scene's prompt; parts: its own prompt."""

    def _build(self, x: Tensor) -> RegionProcessor:
        scene, parts = self._moved(x)
        names, nobody = [region.prompt for region in self.regions], torch.zeros(1, dtype=torch.long)
        return FoundRegions(self.sites, scene, names, parts, self.words, nobody, tuple(x.shape[-2:]))

    def found(self) -> Tensor | None:
        """Masks of the first picture's regions `[U, h, w]`; None before they are found."""
        masks = [processor.found for processor in self._processors.values() if processor.found is not None]
        return masks[-1][:, 0] if masks else None


def with_regions(model, run: RegionRun, noise: NoiseSettings):
    """A clone of MODEL that samples with regions: one evaluation per step; region noise and solo steps look at more, see regional.noise."""
    clone = with_processor(model, run.sites, run, within=run.isolation > 0)
    if noise.is_on or noise.solo > 0:
        clone.add_wrapper_with_key(Wrappers.PREDICT_NOISE, KEY, _RegionNoise(run, noise))
    return clone


def with_found(model, run: FoundRun):
    """A clone of MODEL for one sampling in which concepts are kept to where they are found."""
    return with_processor(model, run.sites, run)


def with_pooled(conditioning, regions: Sequence[Region], own: Sequence[Tensor | None], latent: tuple[int, int], overlap: str):
    """A CONDITIONING whose pooled text is that of a picture with regions, see regional.regions.pooled_of; as it was where a model has
    none, or another node made more prompts of it."""
    def changed(extra: dict) -> dict:
        pooled = extra.get("pooled_output")
        if pooled is None or any(one is None or one.shape != pooled.shape for one in own):
            return extra
        return {**extra, "pooled_output": pooled_of(regions, pooled, own, latent, overlap)}

    return [[hidden, changed(extra)] for hidden, extra in conditioning]


_AFTER = "sampler_post_cfg_function"      # ComfyUI's name of what is told after guidance
_WHOLE_FRAME = ("control", "mask", "area", "gligen", "concat_latent_image")      # what a prompt may carry that fits the whole latent alone


def whole_frame_things(model, conditioning: Sequence) -> list[str]:
    """What prompts or the model carry that belongs to the whole frame: a window cannot be looked at with it."""
    found = {key for _, extra in conditioning for key in _WHOLE_FRAME if key in extra}
    return sorted(found) + ["an inpainting model's picture"] * bool(getattr(model.model, "concat_keys", ()))


class _RegionNoise:
    """Region noise estimation (CIDM Sec. 3.4): mixes guided predictions of the scene and of every region on its own. In solo steps (ours)
    the regions' own, on their windows, are all there is."""

    def __init__(self, run: RegionRun, settings: NoiseSettings) -> None:
        self.run, self.settings = run, settings

    def __call__(self, executor, x, timestep, model_options=None, seed=None):
        progress = progress_of({**model_options["transformer_options"], "sigmas": timestep})
        on, solo = [u for u, region in enumerate(self.run.regions) if region.active(progress)], progress < self.settings.solo
        if not on or not (solo or self.settings.is_on):
            return executor(x, timestep, model_options, seed)
        masks = masks_of([self.run.regions[u] for u in on], *x.shape[-2:], feathered=not solo)
        look, whole = _Look(executor, x, timestep, model_options, seed), Window(0, 0, *x.shape[-2:])
        scene = look(whole)[0] if not solo or scene_is_seen(masks, self.run.overlap) else None
        windows = windows_of(masks, solo or self.settings.area == "crop")
        own: list[dict[str, Tensor]] = [{}] * len(windows)
        try:
            for group in together(windows, x.shape[-2] * x.shape[-1]):
                self.run.only = tuple(on[i] for i in group)
                for i, found in zip(group, look(*(windows[i] for i in group)), strict=True):
                    own[i] = found
        finally:
            self.run.only = None
        # The host mixes denoised pictures, x - sigma * noise; the noise itself is what the paper mixes. Outside a window it is not used.
        sigma = timestep.view(-1, *[1] * (x.ndim - 1))
        alpha, outside = (0.0, "keep") if solo else (self.settings.alpha, self.settings.outside)

        def mixed(name: str) -> Tensor:
            noises = torch.stack([(x - picture[name]) / sigma for picture in own])
            base = torch.zeros_like(x) if scene is None else (x - scene[name]) / sigma
            return x - sigma * region_noise(base, noises, masks, alpha, outside, self.run.overlap)

        return look.told({name: mixed(name) for name in own[0]})


class _Look:
    """Predictions of one step on windows of the latent. What other nodes and samplers (CFG++) want to be told after guidance they are told
    once, of the whole picture, and not of every window."""

    def __init__(self, executor, x: Tensor, timestep: Tensor, model_options: dict, seed) -> None:
        self.executor, self.x, self.timestep, self.options, self.seed = executor, x, timestep, model_options, seed
        self.functions, self.args = list(model_options.get(_AFTER, [])), {}

    def _keep(self, args: dict) -> Tensor:
        self.args = args
        return args["denoised"]

    def __call__(self, *windows: Window) -> list[dict[str, Tensor]]:
        """Of windows of one size, evaluated as one batch, the guided prediction, and its two halves where somebody asks; each in its place
        in zeros of the latent's size."""
        options = {**self.options, _AFTER: [self._keep]} if self.functions else self.options
        cut, count = [window.cut(self.x) for window in windows], len(windows)
        x, timestep = (cut[0], self.timestep) if count == 1 else (torch.cat(cut), self.timestep.repeat(count))
        found = {"denoised": self.executor(x, timestep, options, self.seed)}
        found |= {name: self.args[name] for name in ("cond_denoised", "uncond_denoised") if torch.is_tensor(self.args.get(name))}
        apart = {name: picture.chunk(count) for name, picture in found.items()}
        return [{name: window.back(pictures[i], self.x) for name, pictures in apart.items()} for i, window in enumerate(windows)]

    def told(self, found: dict[str, Tensor]) -> Tensor:
        args = {**self.args, **found, "input": self.x, "sigma": self.timestep, "model_options": self.options}
        for function in self.functions:
            args["denoised"] = function(args)
        return args["denoised"]

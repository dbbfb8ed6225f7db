"""MODELs that carry concepts: deltas by ComfyUI's own weight patches, layer-wise words and regions by its wrappers and attn2 patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import comfy.lora
import comfy.patcher_extension
import comfy.samplers
import torch
from torch import Tensor

from ...deltas import Deltas, LowRankDelta
from ...regional.artists import Artists, MapRecorder, Subject
from ...regional.noise import NoiseSettings, Window, region_noise, scene_is_seen, window_of
from ...regional.observe import ObservedRegions
from ...regional.program import Part
from ...regional.regions import Region, masks_of, pooled_of
from ..backbone import Context, SiteProgram
from .backbone import plain_weights, without_dynamic
from .bound import BoundRun, code, words_of
from .sites import OFFSETS, WORDS, Before, DiffusionWrapper, UNetSites, program_patches

KEY = "continual_concepts"
_Wrappers = comfy.patcher_extension.WrappersMP


def weight_patches(sites: UNetSites, deltas: Deltas) -> dict:
    """Deltas as ComfyUI's weight patches: low rank ones as LoRA adapters, sparse ones as differences."""
    state, keys = {}, {}
    for (index, projection), delta in deltas.items():
        name = f"{index}.{projection}"
        keys[name] = sites.key(sites.layout.sites[index], projection)
        if isinstance(delta, LowRankDelta):
            state[f"{name}.lora_up.weight"], state[f"{name}.lora_down.weight"] = delta.up.float(), delta.down.float()
            state[f"{name}.alpha"] = torch.tensor(delta.scale * delta.down.shape[0])
        else:
            state[f"{name}.diff"] = delta.dense()
    return comfy.lora.load_lora(state, keys)


def fold(model, sites: UNetSites, deltas: Deltas, layerwise: bool):
    """A clone of MODEL with deltas on its weights, which reads layer-wise words when `layerwise`. With neither, MODEL itself."""
    if not deltas and not layerwise:
        return model
    clone = model.clone()
    if deltas:
        clone.add_patches(weight_patches(sites, deltas))
    if layerwise:
        _wrap(clone, program_of(model))
        _once(clone, "attn2_patch", Before(sites.addresses))
    return clone


def program_of(model):
    """What the sites of a MODEL do already, `program(options, x)`, or None."""
    found = model.get_wrappers(_Wrappers.DIFFUSION_MODEL, KEY)
    return found[0].program if found else None


def _wrap(clone, program) -> None:
    clone.remove_wrappers_with_key(_Wrappers.DIFFUSION_MODEL, KEY)
    clone.add_wrapper_with_key(_Wrappers.DIFFUSION_MODEL, KEY, DiffusionWrapper(program))


def with_bound(model, sites: UNetSites, deltas: Mapping[str, Deltas]):
    """A clone of MODEL in which concepts act through their words, wherever a prompt of a concept CLIP has them; MODEL itself for none."""
    if not deltas:
        return model
    below = program_of(model)
    return _programmed(model, sites, BoundRun(deltas, below if isinstance(below, BoundRun) else None))


def _once(model, name: str, patch) -> None:
    """Appends a patch unless one of its kind is there (two ElasticWeightAggregate nodes in a row)."""
    there = model.model_options["transformer_options"].get("patches", {}).get(name, [])
    if not any(type(other) is type(patch) for other in there):
        model.set_model_patch(patch, name)


def context_of(conditioning, copies: int, names: Sequence[str] = ()) -> Context:
    """The first entry of a CONDITIONING as a context `[1, L, N, D]`; names: the concepts whose words are to be found in it."""
    hidden, extra = conditioning[0]
    conds = extra.get("model_conds", {})
    layers = hidden.unsqueeze(1) if OFFSETS not in conds else hidden.unsqueeze(1) + conds[OFFSETS].cond.to(hidden)
    words = words_of(conds[WORDS].cond, {code(name): name for name in names}) if WORDS in conds else ({},) * len(hidden)
    return Context(layers.expand(-1, copies, -1, -1) if layers.shape[1] == 1 else layers, extra.get("pooled_output"), words)


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
    only: int | None = None     # region noise estimation: the region whose own picture is being estimated, over the full frame
    _programs: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._scene = BoundRun(self.bound)

    def __call__(self, options: dict, x: Tensor) -> ObservedRegions:
        which = options["cond_or_uncond"]
        rows = torch.tensor([1 - kind for kind in which], device=x.device).repeat_interleave(x.shape[0] // len(which))
        key = (self.only, tuple(x.shape[-2:]))
        if key not in self._programs:
            self._programs[key] = self._build(x)
        program = self._programs[key]
        program.rows, program.progress = rows, _progress(options)
        program.scene_concepts = self._scene.concepts(options, x)
        program.is_observing = program.progress == 1.0 and self.only is None and bool(rows.any())
        return program

    def pooled(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """Every region's pooled text, of its negative and its prompt `[1, P]`, None where the model has none."""
        found = [part.context.pooled for part in self.parts]
        return [(None, None) if rows is None else (rows[:1], rows[1:2]) for rows in found]

    def maps(self, size: tuple[int, int]) -> Tensor:
        """Attention per region in the last step, `[U, H, W]` in 0..1."""
        seen = [program for (only, _), program in self._programs.items() if only is None]
        return seen[-1].picture_maps(size) if seen else torch.zeros(len(self.regions), *size)

    def _build(self, x: Tensor) -> ObservedRegions:
        used = {name for part in self.parts for words in part.context.words for name in words}
        bound = {name: {key: delta.to(x.device) for key, delta in self.bound[name].items()} for name in used}
        parts = [Part(_moved(part.context, x), {key: delta.to(x.device) for key, delta in part.deltas.items()}, bound)
                 for part in self.parts]
        scene = Part(self.scene.context, {key: delta.to(x.device) for key, delta in self.scene.deltas.items()})
        regions, words = list(self.regions), list(self.words)
        if self.only is not None:
            u = self.only
            regions, parts, words = [Region(regions[u].prompt, box=(0.0, 0.0, 1.0, 1.0))], [parts[u]], [words[u]]
        nobody = torch.zeros(1, dtype=torch.long)
        return ObservedRegions(self.sites, scene, regions, parts, nobody, tuple(x.shape[-2:]), self.overlap, tokens=words)


def _moved(context: Context, x: Tensor) -> Context:
    return Context(context.hidden.to(x.device, x.dtype), None, context.words)


def _progress(options: dict) -> float:
    """Share of the sampling steps behind the current noise level: 0 at the first, 1 at the last."""
    sigmas, sigma = options.get("sample_sigmas"), options.get("sigmas")
    if sigmas is None or sigma is None or len(sigmas) < 3:
        return 0.0
    done = int((sigmas[:-1] > sigma.flatten()[0].to(sigmas) + 1e-6).sum())
    return min(1.0, done / (len(sigmas) - 2))


def _programmed(model, sites: UNetSites, program):
    """A clone of MODEL whose sites do what `program(options, x)` says in each UNet call."""
    clone = model.clone()
    options = clone.model_options["transformer_options"]
    patches = program_patches(sites, options.get("patches_replace", {}).get("attn2"))
    for address, replace in patches["patches_replace"]["attn2"].items():
        clone.set_model_attn2_replace(replace, *address)
    before, keep = patches["patches"]["attn2_patch"]
    _once(clone, "attn2_patch", before)
    _once(clone, "attn2_patch", keep)
    _once(clone, "attn2_output_patch", patches["patches"]["attn2_output_patch"][0])
    _wrap(clone, program)
    return clone


def with_regions(model, run: RegionRun, noise: NoiseSettings):
    """A clone of MODEL that samples with regions: one evaluation per step; region noise and solo steps look at more, see regional.noise."""
    clone = _programmed(model, run.sites, run)
    if noise.is_on or noise.solo > 0:
        clone.add_wrapper_with_key(_Wrappers.PREDICT_NOISE, KEY, _RegionNoise(run, noise))
    return clone


def with_pooled(conditioning, regions: Sequence[Region], own: Sequence[Tensor | None], latent: tuple[int, int], overlap: str):
    """A CONDITIONING whose pooled text is that of a picture with regions, see regional.regions.pooled_of; as it was where a model has
    none, or another node made more prompts of it."""
    def changed(extra: dict) -> dict:
        pooled = extra.get("pooled_output")
        if pooled is None or any(one is None or one.shape != pooled.shape for one in own):
            return extra
        return {**extra, "pooled_output": pooled_of(regions, pooled, own, latent, overlap)}

    return [[hidden, changed(extra)] for hidden, extra in conditioning]


_WHOLE_FRAME = ("control", "mask", "area", "gligen", "concat_latent_image")      # what a prompt may carry that fits the whole latent alone


def whole_frame_things(model, conditioning: Sequence) -> list[str]:
    """What prompts or the model carry that belongs to the whole frame: a window cannot be looked at with it."""
    found = {key for _, extra in conditioning for key in _WHOLE_FRAME if key in extra}
    return sorted(found) + ["an inpainting model's picture"] * bool(getattr(model.model, "concat_keys", ()))


def with_artists(model, sites: UNetSites, subject: Subject, strength: float):
    """A clone of MODEL for one sampling, in which the attention artists move the latent; MODEL itself where there is nothing for them."""
    if not Artists([subject], strength).works(0.0):
        return model
    run = _ArtistRun(subject, strength, program_of(model))
    clone = _programmed(without_dynamic(model), sites, run.program)
    clone.add_wrapper_with_key(_Wrappers.PREDICT_NOISE, KEY, run)
    return clone


class _ArtistRun:
    """State of one sampling with attention artists. The latent belongs to the host's sampler, so what the artists move it by is kept here,
    in units of the noise level, and added before every evaluation: with Euler and DPM++ 2M that is the moved latent exactly, with samplers
    that renew the noise nearly."""

    def __init__(self, subject: Subject, strength: float, below=None) -> None:
        self.subject, self.strength, self.below = subject, strength, below
        self.offset: Tensor | None = None
        self.recorder: MapRecorder | None = None      # while the artists look

    def program(self, options: dict, x: Tensor) -> SiteProgram | None:
        below = None if self.below is None else self.below(options, x)
        if self.recorder is not None:
            self.recorder.inner = below or SiteProgram()
            return self.recorder
        return below

    def __call__(self, executor, x, timestep, model_options=None, seed=None):
        sigma = timestep.view(-1, *[1] * (x.ndim - 1)).to(x)
        if self.offset is None:
            self.offset, self.artists = torch.zeros_like(x), Artists([self.subject] * len(x), self.strength)
        x = x + sigma * self.offset
        if self.artists.works(_progress({**model_options["transformer_options"], "sigmas": timestep})):
            moved = self._moved(executor.class_obj, x, timestep, sigma, model_options)
            self.offset = self.offset + (moved - x) / sigma
            x = moved
        return executor(x, timestep, model_options, seed)

    @torch.inference_mode(False)      # the host samples under it; gradients are needed here, of the latent alone
    def _moved(self, guider, x: Tensor, timestep: Tensor, sigma: Tensor, model_options: dict) -> Tensor:
        inner = guider.inner_model
        plain_weights(inner.diffusion_model)
        scale = (sigma.square() + 1).sqrt().clone()      # the host's latents are that much larger than what the UNet reads

        def look(latents: Tensor, recorder: MapRecorder) -> None:
            self.recorder = recorder
            try:
                comfy.samplers.calc_cond_batch(inner, [guider.conds["positive"][:1]], latents * scale, timestep.clone(), model_options)
            finally:
                self.recorder = None

        return self.artists.moved(x.clone() / scale, look) * scale


class _RegionNoise:
    """Region noise estimation (CIDM Sec. 3.4): mixes guided predictions of the scene and of every region on its own. In solo steps (ours)
    the regions' own, on their windows, are all there is."""

    def __init__(self, run: RegionRun, settings: NoiseSettings) -> None:
        self.run, self.settings = run, settings

    def __call__(self, executor, x, timestep, model_options=None, seed=None):
        progress = _progress({**model_options["transformer_options"], "sigmas": timestep})
        on, solo = [u for u, region in enumerate(self.run.regions) if region.active(progress)], progress < self.settings.solo
        masks = masks_of([self.run.regions[u] for u in on], *x.shape[-2:]) if on else x.new_zeros(0, *x.shape[-2:])
        is_seen = not (solo and on) or scene_is_seen(masks, self.run.overlap)
        scene = executor(x, timestep, model_options, seed) if is_seen else torch.zeros_like(x)
        if not on or not (solo or self.settings.is_on):
            return scene
        is_cut = solo or self.settings.area == "crop"
        own = self._own(executor, x, timestep, model_options, seed, on, [window_of(mask) for mask in masks] if is_cut else None)
        # The host mixes denoised pictures, x - sigma * noise; the noise itself is what the paper mixes. Outside a window it is not used.
        sigma = timestep.view(-1, *[1] * (x.ndim - 1))
        noises = torch.stack([(x - picture) / sigma for picture in own])
        alpha, outside = (0.0, "keep") if solo else (self.settings.alpha, self.settings.outside)
        return x - sigma * region_noise((x - scene) / sigma, noises, masks, alpha, outside, self.run.overlap)

    def _own(self, executor, x, timestep, model_options, seed, on: list[int], windows: list[Window] | None) -> list[Tensor]:
        whole, own = Window(0, 0, *x.shape[-2:]), []
        try:
            for i, u in enumerate(on):
                window = whole if windows is None else windows[i]
                self.run.only = u
                own.append(window.back(executor(window.cut(x), timestep, model_options, seed), x))
        finally:
            self.run.only = None
        return own

"""Regional Concept Sampler."""

from __future__ import annotations

from dataclasses import replace

import comfy.samplers
import torch
from comfy_api.latest import io, ui

from nodes import common_ksampler  # ComfyUI's own: ours are relative imports

from ..core.bank.bank import ConceptBank
from ..core.comfy import apply as putting
from ..core.comfy import regions as regional
from ..core.comfy.sites import UNetSites, find_sites
from ..core.comfy.text import concept_clip, encode, learned_positions, subject_of, text_widths
from ..core.conditioning.routing import aggregate, always_on_deltas, token_lora_deltas
from ..core.errors import ConceptError
from ..core.images import regions_picture, to_tensor
from ..core.model.backbone import Context
from ..core.regional.found import prompts_apart
from ..core.regional.noise import AREAS, OUTSIDE, NoiseSettings
from ..core.regional.processor import Part
from ..core.regional.regions import OVERLAPS, Region, masks_of
from . import types
from .schema import ADVANCED, Schema


class RegionalConceptSampler(io.ComfyNode):
    """KSampler with regions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RegionalConceptSampler",
            display_name="Regional Concept Sampler",
            category=types.USING,
            search_aliases=["regional prompt", "ksampler", "attention couple", "multi concept", "region sampler"],
            description="Several concepts in one picture, each in its own region, at one UNet evaluation per step whatever their number. "
            "Without regions it is KSampler.",
            inputs=[
                io.Model.Input("model", tooltip="A plain checkpoint's, or one that carries concepts already."),
                io.Clip.Input("clip", tooltip="The same checkpoint's."),
                io.Latent.Input(
                    "latent_image", tooltip="Empty, or a photo's latent for editing and style transfer (with denoise below 1)."
                ),
                io.String.Input(
                    "scene",
                    multiline=True,
                    default="a photo of a dog and a cat in a meadow",
                    tooltip="The whole picture. Used where no region is.",
                ),
                io.String.Input("negative_scene", multiline=True, default="", tooltip="What is not to be in the picture."),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip="Same seed, same picture."
                ),
                io.Int.Input("steps", default=20, min=1, max=10_000, tooltip="Sampling steps, as in KSampler."),
                io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Guidance scale; 1 = none."),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="euler", tooltip="As in KSampler."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="normal", tooltip="As in KSampler."),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="1 = from noise; less keeps the latent's structure."
                ),
                io.Float.Input("strength", default=1.0, min=-2.0, max=2.0, step=0.05, tooltip="Factor on the concepts' deltas; 0 = none."),
                io.Boolean.Input(
                    "region_noise",
                    default=False,
                    tooltip="CIDM's region noise estimation: sharper regions for one more UNet evaluation per region and step.",
                ),
                io.Float.Input(
                    "alpha", default=0.1, min=0.0, max=1.0, step=0.05, tooltip="Share of the scene inside regions (region_noise)."
                ),
                io.Combo.Input(
                    "outside",
                    options=list(OUTSIDE),
                    default="keep",
                    tooltip="Region noise outside regions: keep the scene, or the literal formula of the paper.",
                ),
                types.Bank.Input("bank", optional=True, tooltip="Concepts for the prompts of scene and regions."),
                types.Regions.Input("regions", optional=True, tooltip="From the region nodes; none = KSampler's picture."),
                io.Conditioning.Input("positive", optional=True, tooltip="Instead of 'scene', e.g. from Apply ControlNet."),
                io.Conditioning.Input("negative", optional=True, tooltip="Instead of 'negative_scene'."),
                io.Float.Input(
                    "artists",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    optional=True,
                    tooltip="Without regions, when the scene names two concepts or more: how strongly each is given attention of its own "
                    "(L2DM's attention artists). 0 = off.",
                    **ADVANCED,
                ),
                io.Combo.Input(
                    "overlap",
                    options=list(OVERLAPS),
                    default="average",
                    optional=True,
                    tooltip="Where regions lie over each other: mix them evenly, let the first lie on top, or give each place to the "
                    "region whose centre is nearest.",
                ),
                io.Combo.Input(
                    "noise_area",
                    options=list(AREAS),
                    default="frame",
                    optional=True,
                    tooltip="Region noise on the whole frame (the paper), or on a window of the region's size, which costs by area.",
                    **ADVANCED,
                ),
                io.Float.Input(
                    "solo",
                    default=0.4,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="Share of the first steps in which every region is drawn alone, so that what it names is there. Costs nothing "
                    "more where regions cover the picture. 0 = off.",
                ),
                io.Float.Input(
                    "isolation",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="Share of the first steps in which regions do not see each other in self-attention: less rubs off on "
                    "neighbours, and a step is quicker. 0 = off.",
                ),
                io.Boolean.Input(
                    "find_regions",
                    default=False,
                    optional=True,
                    tooltip="Without regions, when the scene names several concepts: find in the first steps where each of them is, and "
                    "keep it there. Costs nothing more.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent"), io.Image.Output(display_name="attention")],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        latent_image,
        scene,
        negative_scene,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        denoise,
        strength,
        region_noise,
        alpha,
        outside,
        bank=None,
        regions=None,
        positive=None,
        negative=None,
        artists=0.0,
        overlap="average",
        noise_area="frame",
        solo=0.4,
        isolation=0.0,
        find_regions=False,
    ) -> io.NodeOutput:
        if overlap not in OVERLAPS or not 0 <= isolation <= 1:
            raise ConceptError(f"overlap and isolation are {overlap!r} and {isolation}; allowed: {', '.join(OVERLAPS)}; 0 to 1")
        if find_regions and artists > 0:
            raise ConceptError(f"find_regions is on and artists is {artists}; both part concepts without regions: use one of them")
        noise = NoiseSettings(region_noise, alpha, outside, noise_area, solo)
        sites = find_sites(model, text_widths(clip))
        bank = ConceptBank(sites.layout) if bank is None else bank
        bank.check_fits(sites.layout)
        layerwise = any(part.tokens.copies > 1 for part in bank)
        talk = _Talk(concept_clip(clip, bank), bank, sites, strength)
        positive = talk.encode(scene) if positive is None else positive
        negative = talk.encode(negative_scene) if negative is None else negative
        model = putting.fold(model, sites, always_on_deltas(bank), layerwise)
        on = [region for region in regions or [] if region.strength > 0]
        _check_masks(on, latent_image)
        finding = find_regions and not on and talk.named(scene)
        if on:
            run = talk.run(scene, positive, negative, on, overlap, isolation)
            model = regional.with_regions(model, run, _checked(noise, regional.whole_frame_things(model, [*positive, *negative])))
            pooled, latent_size = run.pooled(), tuple(latent_image["samples"].shape[-2:])
            positive = regional.with_pooled(positive, on, [rows[1] for rows in pooled], latent_size, overlap)
            negative = regional.with_pooled(negative, on, [rows[0] for rows in pooled], latent_size, overlap)
        elif finding:
            run = talk.finding(scene, positive, negative)
            model = regional.with_found(model, run)
        else:
            model = putting.with_bound(putting.fold(model, sites, talk.deltas(scene), False), sites, talk.bound)
        if artists > 0 and not on:
            model = putting.with_artists(model, sites, subject_of(talk.clip, scene), artists)
        latent = common_ksampler(model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise)[0]
        if not on and not finding:
            return io.NodeOutput(latent, torch.zeros(1, 64, 64, 3))
        picture = _attention(run, on, latent["samples"]) if on else _found(run)
        return io.NodeOutput(latent, picture, ui=ui.PreviewImage(picture, cls=cls))


class _Talk:
    """Prompts, through the bank and the CLIP."""

    def __init__(self, clip, bank: ConceptBank, sites: UNetSites, strength: float) -> None:
        self.clip, self.bank, self.sites, self.strength = clip, bank, sites, strength
        self.bound = token_lora_deltas(bank, strength)

    def encode(self, text: str):
        return encode(self.clip, text)

    def deltas(self, text: str) -> dict:
        if not len(self.bank) or not self.strength:
            return {}
        return aggregate(None, self.bank, text, "sharp", self.strength, always_on=False).deltas

    def context(self, conditioning) -> Context:
        copies = max([part.tokens.copies for part in self.bank], default=1)
        return putting.context_of(conditioning, copies, tuple(self.bound))

    def named(self, scene: str) -> dict[str, str]:
        """Concept -> its own prompt, of a scene that names two or more that can be found in it."""
        texts = prompts_apart(self.bank, scene)
        return texts if 1 < len(texts) == len(subject_of(self.clip, scene).concepts) else {}

    def part(self, text: str, below: Context) -> Part:
        return Part(Context.cat([below, self.context(self.encode(text))]), self.deltas(text))

    def run(self, scene: str, positive, negative, regions: list[Region], overlap: str, isolation: float) -> regional.RegionRun:
        below = self.context(negative)
        parts = [self.part(one.prompt, self.context(self.encode(one.negative)) if one.negative else below) for one in regions]
        words = [learned_positions(self.clip, region.prompt) for region in regions]
        shown = Part(Context.cat([below, self.context(positive)]), self.deltas(scene))
        return regional.RegionRun(self.sites, shown, regions, parts, words, self.bound, overlap, isolation)

    def finding(self, scene: str, positive, negative) -> regional.FoundRun:
        below, texts = self.context(negative), self.named(scene)
        parts = [self.part(text, below) for text in texts.values()]
        shown = Part(Context.cat([below, self.context(positive)]), self.deltas(scene))
        everywhere = [Region(name, box=(0.0, 0.0, 1.0, 1.0)) for name in texts]
        return regional.FoundRun(self.sites, shown, everywhere, parts, subject_of(self.clip, scene).concepts, self.bound)


def _checked(noise: NoiseSettings, whole: list[str]) -> NoiseSettings:
    """Without windows where something belongs to the whole frame: it gives the layout anyway. An error where windows were asked for."""
    if whole and noise.is_on and noise.area == "crop":
        raise ConceptError(f"noise_area is 'crop', but the prompt or the model carries {whole[0]}, which belongs to the whole picture; "
                           "choose noise_area 'frame'")
    return replace(noise, solo=0.0) if whole else noise


def _check_masks(regions: list[Region], latent: dict) -> None:
    height, width = latent["samples"].shape[-2:]
    for region in regions:
        if region.mask is not None:
            rows, columns = region.mask.shape
            if abs(columns / rows - width / height) > 0.05 * width / height:
                raise ConceptError(
                    f"the mask of region '{region.prompt}' is {columns}x{rows}, the picture's sides are as {width} to {height}; "
                    "the mask must have the picture's proportions"
                )


def _found(run: regional.FoundRun) -> torch.Tensor:
    """A picture of where each concept was found in the first picture of the batch."""
    masks = run.found()
    if masks is None:
        return torch.zeros(1, 64, 64, 3)
    return to_tensor(regions_picture(masks, masks, [f"<{region.prompt}>" for region in run.regions]))


def _attention(run: regional.RegionRun, regions: list[Region], samples: torch.Tensor) -> torch.Tensor:
    height, width = samples.shape[-2:]
    maps = run.maps((height, width))
    return to_tensor(regions_picture(masks_of(regions, height, width), maps, [region.prompt for region in regions]))


NODES = [RegionalConceptSampler]

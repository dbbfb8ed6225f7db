"""The node Regional Concept Sampler."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io, ui

from nodes import common_ksampler  # ComfyUI's module; ours are relative imports

from ..core.charts import note_picture
from ..core.comfy.region_sampling import Scene, prepare
from ..core.images import to_tensor
from ..core.regional.noise import AREAS, OUTSIDE, NoiseSettings
from ..core.sampling.settings import SampleSettings
from . import types
from .inputs import crop_denoising_input, isolation_input, overlap_input
from .progress import tell
from .schema import Schema, advanced

# CIDM's region noise and what few pictures need
ADVANCED = ("region_noise", "alpha", "outside", "artists", "overlap", "noise_area", "isolation")
SAMPLERS, SCHEDULERS = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS


class RegionalConceptSampler(io.ComfyNode):
    """KSampler with regions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="RegionalConceptSampler",
            display_name="Regional Concept Sampler",
            category=types.REGIONS,
            search_aliases=[
                "regional prompt",
                "ksampler",
                "attention couple",
                "multi concept",
                "region sampler",
            ],
            description="Several concepts in one picture, each in its own region. After crop "
            "denoising, a step needs one evaluation of the model, however many regions there are. Without "
            "regions it gives KSampler's picture.",
            inputs=advanced(ADVANCED, [
                io.Model.Input(
                    "model",
                    tooltip="The model of a checkpoint, plain or with concepts of Apply Concepts. "
                    "Each concept acts once.",
                ),
                io.Clip.Input("clip", tooltip="From the same checkpoint."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="Empty, or a photo's latent for editing and style transfer (denoise below 1).",
                ),
                io.String.Input(
                    "scene",
                    multiline=True,
                    default="a photo of a dog and a cat in a meadow",
                    tooltip="The prompt of the whole picture. It acts where no region is.",
                ),
                io.String.Input(
                    "negative_scene",
                    multiline=True,
                    default="",
                    tooltip="The negative prompt of the whole picture.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The same seed gives the same picture.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10_000, tooltip="Sampling steps."),
                io.Float.Input(
                    "cfg",
                    default=7.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance scale; 1 = none.",
                ),
                io.Combo.Input("sampler_name", options=SAMPLERS, default="euler", tooltip="As in KSampler."),
                io.Combo.Input("scheduler", options=SCHEDULERS, default="normal", tooltip="As in KSampler."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 = from noise; a lower value keeps the latent's structure.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-2.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Factor on the concepts' deltas; 0 = none.",
                ),
                io.Boolean.Input(
                    "region_noise",
                    default=False,
                    tooltip="CIDM's region noise estimation: sharper regions for one more evaluation of the "
                    "model per region and step.",
                ),
                io.Float.Input(
                    "alpha",
                    display_name="scene inside regions",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the scene inside regions, for region_noise.",
                ),
                io.Combo.Input(
                    "outside",
                    display_name="noise outside regions",
                    options=list(OUTSIDE),
                    default="keep",
                    tooltip="Region noise outside regions: keep the scene, or the paper's literal formula.",
                ),
                types.Bank.Input(
                    "bank",
                    optional=True,
                    tooltip="Concepts for scene and regions. They replace concepts of the same name in the "
                            "model. None = those of the model.",
                ),
                types.Regions.Input(
                    "regions", optional=True, tooltip="From the region nodes; none = KSampler's picture."
                ),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="Instead of 'scene', e.g. from Apply ControlNet."
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="Instead of 'negative_scene'."),
                io.Float.Input(
                    "artists",
                    display_name="attention guidance",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    optional=True,
                    tooltip="Without regions, when the scene names two concepts or more: how strongly "
                    "each of them gets attention (L2DM's attention artists). 0 = off.",
                ),
                overlap_input(),
                io.Combo.Input(
                    "noise_area",
                    options=list(AREAS),
                    default="frame",
                    optional=True,
                    tooltip="Where region noise is estimated: on the whole frame (the paper), or on a "
                    "crop of the region's size. A crop costs less for a small region.",
                ),
                crop_denoising_input(
                    0.4, "Takes extra time if regions are narrower than half the picture, or leave "
                         "parts of it free. 0 = off."),
                isolation_input(),
                io.Boolean.Input(
                    "find_regions",
                    default=False,
                    optional=True,
                    tooltip="Without regions, when the scene names several concepts: find in the first steps "
                    "where each of them is, and keep it there. Takes no extra time.",
                ),
            ]),
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
        settings = SampleSettings(
            steps,
            cfg,
            strength=strength,
            noise=NoiseSettings(region_noise, alpha, outside, noise_area, solo),
            overlap=overlap,
            isolation=isolation,
            artists=artists,
        )
        prompts = Scene(scene, negative_scene, positive, negative)
        size = tuple(latent_image["samples"].shape[-2:])
        prepared = prepare(model, clip, bank, prompts, regions or [], size, settings, find_regions, tell)
        positive, negative = prepared.positive, prepared.negative
        settings_of_ksampler = (seed, steps, cfg, sampler_name, scheduler)
        latent = common_ksampler(
            prepared.model, *settings_of_ksampler, positive, negative, latent_image, denoise
        )[0]
        picture = prepared.picture(latent["samples"])
        if picture is None:
            note = note_picture("No regions were used, so there is no attention of regions to show.")
            return io.NodeOutput(latent, to_tensor(note))
        return io.NodeOutput(latent, picture, ui=ui.PreviewImage(picture, cls=cls))


NODES = [RegionalConceptSampler]

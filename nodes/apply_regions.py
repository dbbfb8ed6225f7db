"""The node Apply Regions: regions as a MODEL and CONDITIONINGs."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.comfy.region_sampling import apply_regions
from ..core.regional.noise import NoiseSettings
from ..core.sampling.settings import SampleSettings
from . import types
from .inputs import crop_denoising_input, isolation_input, overlap_input
from .progress import tell
from .schema import Schema, advanced


class ConceptRegionsApply(io.ComfyNode):
    """Regions for any sampler node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptRegionsApply",
            display_name="Apply Regions",
            category=types.REGIONS,
            search_aliases=["regional prompt", "attention couple", "regional conditioning", "region model"],
            description="Adds regions to a model and its prompts, for KSampler, SamplerCustomAdvanced, "
            "upscalers and detailers. Gives the same picture as Regional Concept Sampler with the same "
            "settings.",
            inputs=advanced(("overlap", "isolation"), [
                io.Model.Input(
                    "model", tooltip="From Apply Concepts, with its concepts, or a plain model."
                ),
                io.Clip.Input("clip", tooltip="From the same node. It encodes the prompts of the regions."),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt of the whole picture. It acts where no region is."
                ),
                types.Regions.Input(
                    "regions",
                    optional=True,
                    tooltip="From the region nodes; none = model and prompts unchanged. Positions are "
                    "fractions of the sampled latent, whatever its size. A node that samples a tile or a "
                    "detail as a separate picture therefore shows the whole layout in it.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The negative prompt of the whole picture; none = an empty one.",
                ),
                overlap_input(),
                crop_denoising_input(
                    0.0, "0 = off; 0.4 for a picture from noise, 0 for tiles and second passes."),
                isolation_input(),
            ]),
            outputs=[
                io.Model.Output(display_name="model"),
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        positive,
        regions=None,
        negative=None,
        overlap="average",
        solo=0.0,
        isolation=0.0,
    ) -> io.NodeOutput:
        settings = SampleSettings(
            noise=NoiseSettings(crop_denoising=solo), overlap=overlap, isolation=isolation
        )
        applied = apply_regions(model, clip, positive, negative, regions or [], settings, tell)
        return io.NodeOutput(applied.model, applied.positive, applied.negative)


NODES = [ConceptRegionsApply]

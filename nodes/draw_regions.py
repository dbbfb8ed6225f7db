"""Draw Concept Regions and Show Concept Regions."""

from __future__ import annotations

from dataclasses import replace

import torch
from comfy_api.latest import io, ui
from PIL import ImageColor

from ..core.charts import outlines_picture
from ..core.errors import ConceptError
from ..core.images import colour
from ..core.regional.drawing import DrawnRegion, parse_regions
from ..core.regional.regions import Region, region_mask
from . import types
from .schema import Schema

# Each prompt tells what is in its region alone: in the sampler's solo steps a region is a picture of its own
EXAMPLE = """[
{"name": "left", "prompt": "a photo of <rex> in a meadow", "box": [0, 0.15, 0.5, 1]},
{"name": "right", "prompt": "a photo of <mimi> in a meadow", "box": [0.5, 0.15, 1, 1]}
]"""


class ConceptRegionsDraw(io.ComfyNode):
    """Regions drawn with the mouse. What is drawn is a text; the page only edits it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def side(name: str):
            return io.Int.Input(
                name, default=512, min=16, max=16384, step=8, tooltip=f"The picture's {name}. Gives the drawing its proportions, no more."
            )

        return Schema(
            node_id="ConceptRegionsDraw",
            display_name="Draw Concept Regions",
            category=types.USING,
            search_aliases=["regional prompt", "attention couple", "area", "box", "draw regions"],
            description="Parts of the picture with prompts of their own, drawn as boxes. Connect to Regional Concept Sampler.",
            inputs=[
                io.String.Input(
                    "drawing",
                    multiline=True,
                    default=EXAMPLE,
                    tooltip="The regions as JSON: objects with prompt and box [left, top, right, bottom] in shares of the picture.",
                ),
                side("width"),
                side("height"),
                types.Regions.Input("regions", optional=True, tooltip="Regions before these."),
            ],
            outputs=[types.Regions.Output(display_name="all_regions")],
        )

    @classmethod
    def validate_inputs(cls, drawing):
        """A mistake is told before anything runs: what comes before the sampler may take long. A text on a wire arrives as None."""
        try:
            parse_regions(drawing or "")
        except ConceptError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, drawing, width, height, regions=None) -> io.NodeOutput:
        return io.NodeOutput([*(regions or []), *parse_regions(drawing)])


class ConceptRegionsShow(io.ComfyNode):
    """Outlines of regions over a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptRegionsShow",
            display_name="Show Concept Regions",
            category=types.USING,
            search_aliases=["preview regions", "region overlay", "boxes"],
            description="Draws the outline of every region over a picture, with its name or its prompt.",
            inputs=[
                io.Image.Input("image", tooltip="The picture that was made, or any other."),
                types.Regions.Input("regions", optional=True, tooltip="Nothing = the picture as it is."),
            ],
            outputs=[io.Image.Output(display_name="outlined")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image, regions=None) -> io.NodeOutput:
        if regions:
            height, width = image.shape[1:3]
            # Where a region is, as sharply as the picture can show it
            masks = torch.stack([region_mask(replace(region, feather=0.0), height, width) for region in regions])
            labels, colours = zip(*(_seen(index, region) for index, region in enumerate(regions)), strict=True)
            layer = outlines_picture(masks, labels, colours).to(image)
            ink, cover = layer[..., :3], layer[..., 3:]
            image = torch.cat([image[..., :3] * (1 - cover) + ink * cover, image[..., 3:]], -1)
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


def _seen(index: int, region: Region) -> tuple[str, tuple[int, int, int]]:
    """A region's label and colour: those of its drawing, else its prompt and the colour of its number."""
    if isinstance(region, DrawnRegion):
        return region.name.strip() or region.prompt, ImageColor.getrgb(region.colour)
    return region.prompt, colour(index)


NODES = [ConceptRegionsDraw, ConceptRegionsShow]

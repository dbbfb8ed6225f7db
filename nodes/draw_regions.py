"""The nodes Concept Region Editor and Show Concept Regions."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..core.regional.drawing import parse_regions, with_outlines
from . import types
from .inputs import valid
from .schema import Schema

# prompts describe their regions completely, because crop denoising treats a region as a separate picture
EXAMPLE = """[
{"name": "left", "prompt": "a photo of a dog in a meadow", "box": [0, 0.15, 0.5, 1]},
{"name": "right", "prompt": "a photo of a cat in a meadow", "box": [0.5, 0.15, 1, 1]}
]"""


class ConceptRegionsDraw(io.ComfyNode):
    """Regions drawn with the mouse. The drawing is stored as text, which the web page edits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def side(name: str):
            return io.Int.Input(
                name,
                default=512,
                min=16,
                max=16384,
                step=8,
                tooltip=f"The picture's {name}. Sets the proportions of the drawing, nothing else.",
            )

        return Schema(
            node_id="ConceptRegionsDraw",
            display_name="Concept Region Editor",
            category=types.EVERYDAY,
            search_aliases=["Draw Concept Regions", "regional prompt", "attention couple", "area", "box"],
            description="Defines parts of the picture with their own prompts, drawn as boxes. "
            "Connect to Regional Concept Sampler or Apply Regions.",
            inputs=[
                io.String.Input(
                    "drawing",
                    multiline=True,
                    default=EXAMPLE,
                    tooltip="The regions as JSON: objects with prompt and box [left, top, right, bottom] "
                    "in shares of the picture.",
                ),
                side("width"),
                side("height"),
                types.Regions.Input("regions", optional=True, tooltip="Regions before these."),
            ],
            outputs=[types.Regions.Output(display_name="regions")],
        )

    @classmethod
    def validate_inputs(cls, drawing):
        """Reports an invalid drawing before the graph runs. Text from another node is None at this point."""
        return valid(lambda: parse_regions(drawing or ""))

    @classmethod
    def execute(cls, drawing, width, height, regions=None) -> io.NodeOutput:
        return io.NodeOutput([*(regions or []), *parse_regions(drawing)])


class ConceptRegionsShow(io.ComfyNode):
    """Draws outlines of regions over a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return Schema(
            node_id="ConceptRegionsShow",
            display_name="Show Concept Regions",
            category=types.REGIONS,
            search_aliases=["preview regions", "region overlay", "boxes"],
            description="Draws the outline of every region on a picture, with its name or its prompt.",
            inputs=[
                io.Image.Input("image", tooltip="The generated picture, or any other."),
                types.Regions.Input("regions", optional=True,
                                    tooltip="Not connected = the picture unchanged."),
            ],
            outputs=[io.Image.Output(display_name="image")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image, regions=None) -> io.NodeOutput:
        image = with_outlines(image, regions or [])
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


NODES = [ConceptRegionsDraw, ConceptRegionsShow]

"""The node Concept Region."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.errors import ConceptError
from ..core.regional.regions import Region
from . import types
from .images import masks_of
from .schema import Schema, advanced


class ConceptRegion(io.ComfyNode):
    """One region: a box or a mask with its own prompt. These nodes can be chained."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def fraction(name: str, default: float, tip: str):
            return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tip)

        return Schema(
            node_id="ConceptRegion",
            display_name="Concept Region",
            category=types.REGIONS,
            search_aliases=["regional prompt", "attention couple", "area", "mask prompt"],
            description="Defines a part of the picture with its own prompt. Chain several through 'regions'.",
            inputs=advanced(("start", "end"), [
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="a photo of a dog in a meadow",
                    tooltip="What the region shows; concepts as <name>.",
                ),
                fraction("left", 0.0, "Left edge as a share of the picture's width."),
                fraction("top", 0.0, "Top edge as a share of the height."),
                fraction("right", 0.5, "Right edge as a share of the width."),
                fraction("bottom", 1.0, "Bottom edge as a share of the height."),
                fraction("strength", 1.0, "How much its prompt replaces the scene's; 0 = not at all."),
                fraction("start", 0.0, "Share of the steps at which the region starts; 0 = the first step."),
                fraction("end", 1.0, "Share of the steps at which the region stops; 1 = the last step."),
                io.Float.Input(
                    "feather",
                    default=0.0,
                    min=0.0,
                    max=0.5,
                    step=0.01,
                    tooltip="Width of the soft edge as a share of the smaller side; 0 = hard.",
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    default="",
                    tooltip="The region's negative prompt. Empty = the scene's.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="In place of the box: white where the region is."
                ),
                types.Regions.Input("regions", optional=True, tooltip="Regions before this one."),
            ]),
            outputs=[types.Regions.Output(display_name="regions")],
        )

    @classmethod
    def execute(
        cls,
        prompt,
        left,
        top,
        right,
        bottom,
        strength,
        start,
        end,
        feather,
        negative="",
        mask=None,
        regions=None,
    ) -> io.NodeOutput:
        if not prompt.strip():
            raise ConceptError("the prompt of a region is empty; say what it should show")
        masks = masks_of(mask, f"the masks of region '{prompt}'")
        if len(masks) > 1:
            raise ConceptError(
                f"the mask of region '{prompt}' holds {len(masks)} masks; one region takes one"
            )
        region = Region(
            prompt,
            None if masks else (top, left, bottom, right),
            masks[0][0] if masks else None,
            negative,
            strength,
            start,
            end,
            feather,
        )
        return io.NodeOutput([*(regions or []), region])


NODES = [ConceptRegion]

"""The ComfyUI nodes. They parse inputs, call core and wrap results; all computation is in core."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension

from ..core.errors import ConceptError
from . import (
    apply,
    apply_regions,
    bank,
    draw_regions,
    evaluate,
    export,
    importing,
    judging,
    learn,
    learn_folder,
    neurons,
    photos,
    region_sampler,
    regions,
    settings,
    types,
)


class Extension(ComfyExtension):
    """All nodes of this pack."""

    async def get_node_list(self) -> list[type]:
        # The page shows an error as "module.class: sentence". Our module is named by its path on the disk.
        ConceptError.__module__, ConceptError.__qualname__ = "builtins", "Continual Concepts"
        families = (photos, learn, learn_folder, bank, apply, draw_regions, regions, region_sampler,
                    apply_regions, export, importing, evaluate, settings, judging, neurons)
        nodes = [node for family in families for node in family.NODES]
        # The menu shows nodes and folders in this order: nodes of every day first
        return sorted(nodes, key=lambda node: node.define_schema().category != types.EVERYDAY)

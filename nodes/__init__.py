"""ComfyUI's side: nodes parse, call core and wrap. No maths and no training code here."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension

from . import apply, bank, draw_regions, evaluate, export, importing, learn, neurons, photos, region_sampler, regions, settings


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type]:
        families = (learn, settings, neurons, apply, regions, region_sampler, draw_regions, bank, export, importing, evaluate, photos)
        return [node for family in families for node in family.NODES]

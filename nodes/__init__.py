"""ComfyUI's side: nodes parse, call core and wrap. No maths and no training code here."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension

from . import apply, bank, export, learn, neurons, photos, regions, settings


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type]:
        return [*learn.NODES, *settings.NODES, *neurons.NODES, *apply.NODES, *regions.NODES, *bank.NODES, *export.NODES, *photos.NODES]

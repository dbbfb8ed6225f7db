"""Nodes for ComfyUI that teach a diffusion model concepts one after another, without forgetting."""

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint():
    from .nodes import Extension  # lazy: tests and the command line import this file too, without ComfyUI

    return Extension()

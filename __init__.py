"""Continual Concepts: teach a diffusion model concepts one after another, without forgetting. Nodes for ComfyUI."""

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint():
    from .nodes import Extension  # lazy: tests and the command line import this file too, without ComfyUI

    return Extension()

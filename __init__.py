"""Nodes for ComfyUI that teach a diffusion model concepts one after another, without forgetting."""

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint():
    # lazy: tests and the command line import this file too, without ComfyUI
    from .core.versions import check_versions

    check_versions()
    from .nodes import Extension

    return Extension()

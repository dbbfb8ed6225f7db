"""The only package of core that imports ComfyUI. It wraps a loaded MODEL, CLIP and VAE as a backbone and
applies concepts to them.

sites: hooks for attention processors in a UNet. text: text encoders, and the CLIP with placeholders such as
`<rex>`. backbone and clip_gradients: training. apply: MODELs with concepts. regions and region_sampling:
MODELs with regions. demo: the embedded base as MODEL, CLIP and VAE.
"""

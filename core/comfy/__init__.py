"""The only package of core that imports ComfyUI. It wraps a loaded MODEL, CLIP and VAE as a backbone and
applies concepts to them.

families: one file per family of models. sites: what a call carries for their sites. text and noun_clip: text
encoders; concept_clip: the CLIP with placeholders such as `<rex>`. backbone and clip_gradients: training.
apply: MODELs with concepts. regions and region_sampling: MODELs with regions. demo: the embedded base as
MODEL, CLIP and VAE.
"""

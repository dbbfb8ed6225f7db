"""The only part of core that knows ComfyUI: a loaded MODEL, CLIP and VAE as a backbone, and concepts in them.

sites: the text cross-attention of a UNet, and how attention processors reach it; text: encoders, and the CLIP
that understands `<rex>`; backbone and clip_gradients: for learning; apply: MODELs that carry concepts and
regions; demo: the embedded base as MODEL, CLIP and VAE.
"""

"""Krea 2 with random weights and reduced sizes, and its CLIP, of ComfyUI's own classes."""

from __future__ import annotations

import torch

from .make_flux import clip_of, distance, studio_of
from .make_transformer import TINY, filled, wan_vae

TEXT = 80      # width of the reduced encoder; the host splits it into 20 heads
LAYERS = [1, 2, 3]      # whose states are one row of text, side by side
SIZES = {"features": 256, "txtdim": TEXT, "heads": 2, "kvheads": 1, "layers": 3, "txtlayers": len(LAYERS)}

__all__ = ["LAYERS", "SIZES", "TEXT", "distance", "krea2_clip", "krea2_model", "krea2_studio"]


def krea2_model(dtype: torch.dtype = torch.float32, **sizes):
    """A MODEL as the node Load Diffusion Model gives it."""
    import comfy.ldm.krea2.model as krea2
    import comfy.ops
    import comfy.sd

    with torch.device("meta"):
        shapes = krea2.SingleStreamDiT(**SIZES | sizes, dtype=dtype, device="meta",
                                       operations=comfy.ops.disable_weight_init)
    return comfy.sd.load_diffusion_model_state_dict(filled(shapes, dtype), {"dtype": dtype})


def krea2_clip():
    """A CLIP of Krea 2 with a reduced encoder, which has no vision part."""
    import comfy.ops
    import comfy.sd1_clip
    import comfy.text_encoders.krea2 as krea2
    import comfy.text_encoders.llama as llama
    import comfy.text_encoders.qwen3vl as qwen3vl

    sizes = {"hidden_size": TEXT, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
             "num_key_value_heads": 1}

    class Small(qwen3vl.Qwen3VL):
        def __init__(self, config_dict, dtype, device, operations) -> None:
            torch.nn.Module.__init__(self)
            config = llama.Qwen3VL_4BConfig(**config_dict)
            self.num_layers, self.dtype = config.num_hidden_layers, dtype
            self.model = llama.Llama2_(config, device=device, dtype=dtype, ops=operations)

    class Text(krea2.Krea2TEModel):
        def __init__(self, device="cpu", dtype=None, model_options=None) -> None:
            torch.nn.Module.__init__(self)
            self.clip_name = self.clip = "qwen3vl_4b"
            self.qwen3vl_4b = comfy.sd1_clip.SDClipModel(
                device=device, layer=LAYERS, textmodel_json_config=dict(sizes), dtype=torch.float32,
                special_tokens={"pad": 151643}, layer_norm_hidden_state=False, model_class=Small,
                enable_attention_masks=True, return_attention_masks=True)
            self.dtypes = {torch.float32}

    return clip_of(krea2.Krea2Tokenizer, Text, "qwen3vl_4b")


def krea2_studio(pack, model=None):
    """Our nodes and ComfyUI's with Krea 2, for pictures of 64 pixels."""
    made = studio_of(pack, model or krea2_model(), krea2_clip())
    made.vae = wan_vae(TINY)
    made.latent = lambda count=1: {"samples": torch.zeros(count, 16, 1, 8, 8)}
    return made

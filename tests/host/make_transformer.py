"""Cosmos Predict2 with random weights, through ComfyUI's own loaders, and Wan's VAE; random slots. Anima is
the benchmarks'."""

from __future__ import annotations

import importlib.util

import torch

from continual_concepts.benchmarks.cost.anima import DIT, TINY, Sizes, anima_clip, anima_model, filled
from continual_concepts.core.model.slots import SLOTS, SlotDelta

__all__ = ["Sizes", "anima_clip", "anima_model", "cosmos_clip", "cosmos_model", "filled", "slots",
           "smallest", "wan_vae"]


def slots(layout, seed: int):
    """Random slots of every site."""
    generator = torch.Generator().manual_seed(seed)
    return {(site.index, SLOTS): SlotDelta(torch.randn(5, site.width, generator=generator),
                                           torch.randn(5, site.width, generator=generator), site.heads)
            for site in layout.sites}


def smallest() -> Sizes:
    """The smallest sizes that this ComfyUI loads. Older ones read neither the number of blocks nor the VAE's
    width from a file."""
    reads_sizes = importlib.util.find_spec("comfy.ldm.anima") is not None
    return TINY if reads_sizes else Sizes(blocks=10, picture_width=96)


def cosmos_model(sizes: Sizes = TINY, dtype: torch.dtype = torch.float32):
    """The same of Cosmos Predict2."""
    import comfy.ldm.cosmos.predict2 as predict2
    import comfy.ops
    import comfy.sd

    with torch.device("meta"):
        shapes = predict2.MiniTrainDIT(**DIT, model_channels=sizes.width, num_blocks=sizes.blocks,
                                       num_heads=16, dtype=dtype, device="meta",
                                       operations=comfy.ops.disable_weight_init)
    return comfy.sd.load_diffusion_model_state_dict(filled(shapes, dtype), {"dtype": dtype})


def cosmos_clip(dtype: torch.dtype = torch.float32):
    """A CLIP of Cosmos Predict2's T5-XXL with reduced sizes, which the node Load CLIP does not read from a
    file."""
    import comfy.ops
    import comfy.sd
    import comfy.sd1_clip
    import comfy.supported_models_base
    import comfy.text_encoders.cosmos as cosmos
    import comfy.text_encoders.t5 as t5

    config = {"d_ff": 64, "d_kv": 8, "d_model": 1024, "dense_act_fn": "relu", "is_gated_act": False,
              "model_type": "t5", "num_heads": 4, "num_layers": 1, "layer_norm_epsilon": 1e-6,
              "relative_attention_num_buckets": 32, "vocab_size": 32128, "eos_token_id": 1, "pad_token_id": 0}

    class Encoder(comfy.sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None, **_) -> None:
            super().__init__(device=device, layer="last", textmodel_json_config=dict(config), dtype=dtype,
                             special_tokens={"end": 1, "pad": 0}, model_class=t5.T5,
                             enable_attention_masks=True, return_attention_masks=True, zero_out_masked=True,
                             model_options=model_options or {})

    class Text(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None) -> None:
            super().__init__(device=device, dtype=torch.float32, name="t5xxl", clip_model=Encoder,
                             model_options=model_options or {})

    target = comfy.supported_models_base.ClipTarget(cosmos.CosmosT5Tokenizer, Text)
    clip = comfy.sd.CLIP(target, embedding_directory=None)
    with torch.device("meta"):
        shapes = t5.T5(dict(config), dtype, "meta", comfy.ops.disable_weight_init)
    clip.cond_stage_model.t5xxl.transformer.load_state_dict(filled(shapes, dtype))
    return clip


def wan_vae(sizes: Sizes = TINY):
    """A VAE as the node Load VAE gives it: Wan 2.1's, which Anima uses."""
    import comfy.ldm.wan.vae as wan
    import comfy.sd

    given = {"dim": sizes.picture_width, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
             "attn_scales": [], "temperal_downsample": [False, True, True], "dropout": 0.0}
    with torch.device("meta"):
        shapes = wan.WanVAE(**given)
    return comfy.sd.VAE(sd=filled(shapes))

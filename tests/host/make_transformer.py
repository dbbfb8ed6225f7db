"""Anima and Cosmos Predict2 with random weights, through ComfyUI's own loaders.

The numbers are small enough to keep activations finite. Same sizes, same numbers. Depth and width are reduced
where the host's classes take them; the adapter's and the encoders' depth is a default of the host's, which is
replaced while a model is loaded.
"""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model. The host has 16 heads in every width but 5120; width / 16 must be 16 or more."""

    blocks: int = 2
    width: int = 256
    adapter_layers: int = 1
    encoder_layers: int = 1
    encoder_width: int = 256      # inside its layers
    picture_width: int = 8      # of the VAE


TINY = Sizes()


def smallest() -> Sizes:
    """The smallest sizes that this ComfyUI loads. Older ones read neither the number of blocks nor the VAE's
    width from a file."""
    reads_sizes = importlib.util.find_spec("comfy.ldm.anima") is not None
    return TINY if reads_sizes else Sizes(blocks=10, picture_width=96)


_DIT: dict[str, Any] = {
    "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
    "patch_spatial": 2, "patch_temporal": 1, "concat_padding_mask": True, "crossattn_emb_channels": 1024,
    "pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 256,
    "extra_per_block_abs_pos_emb": False, "rope_enable_fps_modulation": False}


def filled(module: torch.nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random weights for a module on the device "meta". Large tables repeat their first rows."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, like in module.state_dict().items():
        if like.ndim < 2:
            state[name] = torch.zeros(like.shape) if name.endswith("bias") else torch.ones(like.shape)
        elif like.ndim == 2 and like.shape[0] > 20_000:
            rows = torch.randn(997, like.shape[1], generator=generator) * 0.5
            state[name] = rows.repeat(-(-like.shape[0] // 997), 1)[:like.shape[0]].clone()
        else:
            gain = 1.5 / like[0].numel() ** 0.5
            state[name] = torch.randn(like.shape, generator=generator) * gain
        state[name] = state[name].to(dtype)
    return state


@contextmanager
def reduced(sizes: Sizes):
    """While models are loaded: the depth of the parts whose depth the host does not read from a file."""
    import comfy.text_encoders.llama as llama

    with pytest.MonkeyPatch.context() as patch:
        config = llama.Qwen3_06BConfig
        patch.setattr(llama, "Qwen3_06BConfig",
                      partial(config, num_hidden_layers=sizes.encoder_layers,
                              intermediate_size=sizes.encoder_width))
        import comfy.ldm.anima.model as anima

        patch.setattr(anima, "LLMAdapter", partial(anima.LLMAdapter, num_layers=sizes.adapter_layers))
        yield


def anima_model(sizes: Sizes = TINY, dtype: torch.dtype = torch.float32):
    """A MODEL as the node Load Diffusion Model gives it."""
    import comfy.ldm.anima.model as anima
    import comfy.ops
    import comfy.sd

    with reduced(sizes):
        with torch.device("meta"):
            shapes = anima.Anima(**_DIT, model_channels=sizes.width, num_blocks=sizes.blocks, num_heads=16,
                                 dtype=dtype, device="meta", operations=comfy.ops.disable_weight_init)
        return comfy.sd.load_diffusion_model_state_dict(filled(shapes, dtype), {"dtype": dtype})


def cosmos_model(sizes: Sizes = TINY, dtype: torch.dtype = torch.float32):
    """The same of Cosmos Predict2."""
    import comfy.ldm.cosmos.predict2 as predict2
    import comfy.ops
    import comfy.sd

    with torch.device("meta"):
        shapes = predict2.MiniTrainDIT(**_DIT, model_channels=sizes.width, num_blocks=sizes.blocks,
                                       num_heads=16, dtype=dtype, device="meta",
                                       operations=comfy.ops.disable_weight_init)
    return comfy.sd.load_diffusion_model_state_dict(filled(shapes, dtype), {"dtype": dtype})


def anima_clip(sizes: Sizes = TINY, dtype: torch.dtype = torch.float32):
    """A CLIP as the node Load CLIP gives it: Qwen3-0.6B, with the tokenizers of Anima."""
    import comfy.ops
    import comfy.sd
    import comfy.text_encoders.llama as llama

    with reduced(sizes):
        with torch.device("meta"):
            shapes = llama.Qwen3_06B({}, dtype, "meta", comfy.ops.disable_weight_init)
        return comfy.sd.load_text_encoder_state_dicts([filled(shapes, dtype)])


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

"""Anima with random weights, through ComfyUI's own loaders.

The numbers are small enough to keep activations finite. Same sizes, same numbers. Depth and width are reduced
where the host's classes take them; the adapter's and the encoder's depth is a default of the host's, which is
replaced while a model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from .synthetic import normals


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

DIT: dict[str, Any] = {
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
            state[name] = normals(like.shape, generator) * (1.5 / like[0].numel() ** 0.5)
        state[name] = state[name].to(dtype)
    return state


@contextmanager
def reduced(sizes: Sizes) -> Iterator[None]:
    """While models are loaded: the depth of the parts whose depth the host does not read from a file."""
    import comfy.ldm.anima.model as anima
    import comfy.text_encoders.llama as llama

    config = partial(llama.Qwen3_06BConfig, num_hidden_layers=sizes.encoder_layers,
                     intermediate_size=sizes.encoder_width)
    adapter = partial(anima.LLMAdapter, num_layers=sizes.adapter_layers)
    with patch.object(llama, "Qwen3_06BConfig", config), patch.object(anima, "LLMAdapter", adapter):
        yield


def anima_model(sizes: Sizes = TINY, dtype: torch.dtype = torch.float32):
    """A MODEL as the node Load Diffusion Model gives it."""
    import comfy.ldm.anima.model as anima
    import comfy.ops
    import comfy.sd

    with reduced(sizes):
        with torch.device("meta"):
            shapes = anima.Anima(**DIT, model_channels=sizes.width, num_blocks=sizes.blocks, num_heads=16,
                                 dtype=dtype, device="meta", operations=comfy.ops.disable_weight_init)
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

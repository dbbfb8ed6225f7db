"""Shapes of the embedded base: Stable Diffusion's structure, small enough to ship and to train on two cores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .vocabulary import CONTEXT_LENGTH

PICTURE_SIZE = 64
# Eight channels, not Stable Diffusion's four: a 4x4 patch of two-coloured markings does not fit in four numbers.
LATENT_SIZE, LATENT_CHANNELS = 16, 8
TEXT_WIDTH = 128

# Stable Diffusion normalises in 32 groups of 10 or more channels. With 32 channels that would be one channel per group, and the norm
# before the last convolution would wipe out every picture's mean colour; 8 groups keep 4 or more channels each.
NORM_GROUPS = 8
UNET = {
    "sample_size": LATENT_SIZE,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "block_out_channels": (48, 96, 96),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": TEXT_WIDTH,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": NORM_GROUPS,
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": LATENT_CHANNELS,
    "sample_size": PICTURE_SIZE,
    "block_out_channels": (32, 32, 64),
    "layers_per_block": 1,
    "norm_num_groups": NORM_GROUPS,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "scaling_factor": 1.0,
}
TEXT = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT_LENGTH,
    "hidden_act": "quick_gelu",
    "projection_dim": TEXT_WIDTH,
}
# v prediction: at high noise it asks for the picture rather than the noise, which a small net learns colours from sooner.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}


def build_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNET)


def build_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(**VAE)


def build_text_encoder(tokenizer) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **TEXT, **special))


def alphas_cumprod() -> Tensor:
    """Stable Diffusion's scaled-linear schedule, `[1000]`."""
    start, end, steps = SCHEDULE["beta_start"], SCHEDULE["beta_end"], SCHEDULE["num_train_timesteps"]
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, dim=0).float()

"""Networks of the embedded bases: Stable Diffusion's structure, small enough to train on two CPU cores.

The sizes here are those of the base of 64 pixels. A base's file names its own.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TypedDict

import torch
from torch import Tensor, nn

from ..model.schedule import cumulative_alphas
from .autoencoder import Residual, SceneAutoencoder
from .vocabulary import CONTEXT_LENGTH

PICTURE_SIZE = 64
PATCH = 4
# Twelve channels: the leading directions of 4x4 patches. Stable Diffusion's four channels cannot represent
# two-coloured markings.
LATENT_SIZE, LATENT_CHANNELS = PICTURE_SIZE // PATCH, 12
TEXT_WIDTH = 128

# Stable Diffusion normalises in 32 groups of 10 or more channels. With 32 channels there would be one channel
# per group, and the last norm would remove every picture's mean colour. 8 groups have at least 4 channels
# each.
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
VAE = {"latent_channels": LATENT_CHANNELS, "patch": PATCH, "width": 64, "blocks": 3}
TEXT = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT_LENGTH,
    "hidden_act": "quick_gelu",
    "projection_dim": TEXT_WIDTH,
}


class _Schedule(TypedDict):
    """Names of diffusers' scheduler configuration."""

    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    prediction_type: str


# v prediction: at high noise the target is the picture rather than the noise, so that a small network learns
# colours sooner
SCHEDULE: _Schedule = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}


def build_unet(sizes: dict | None = None) -> nn.Module:
    """An untrained UNet; `sizes` as in `UNET`, which is the default."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**(sizes or UNET))


class PatchAutoencoder(nn.Module):
    """Pictures `[B, 3, H, W]` in -1..1 to latents `[B, 12, H/4, W/4]` and back.

    The encoder is linear: it projects 4x4 patches on their leading principal directions and partly equalises
    the strengths. The latents are a thumbnail with detail channels, which a small diffusion model learns much
    faster than learned latents. The decoder inverts this linearly, and a small network adds edges. The class
    has the parts of the interface of diffusers' AutoencoderKL that a backbone uses.
    """

    def __init__(self, latent_channels: int, patch: int, width: int, blocks: int) -> None:
        super().__init__()
        self.patch = patch
        self.encoder = nn.Conv2d(3, latent_channels, patch, stride=patch)
        self.linear = nn.Conv2d(latent_channels, 3 * patch * patch, 1)
        body = [nn.Conv2d(latent_channels, width, 3, padding=1), *(Residual(width) for _ in range(blocks)),
                nn.SiLU()]
        last = nn.Conv2d(width, 3 * patch * patch, 3, padding=1)
        self.detail = nn.Sequential(*body, last)
        nn.init.zeros_(last.weight)
        last.bias = nn.Parameter(torch.zeros(3 * patch * patch))
        levels = (width,) * patch.bit_length()  # diffusers expects the number of halvings + 1
        self.config = SimpleNamespace(scaling_factor=1.0, shift_factor=0.0, latent_channels=latent_channels,
                                      block_out_channels=levels)

    def encode(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=self.encoder(images)))

    def decode(self, latents: Tensor) -> SimpleNamespace:
        pixels = self.linear(latents) + self.detail(latents)
        return SimpleNamespace(sample=nn.functional.pixel_shuffle(pixels, self.patch))


Autoencoder = PatchAutoencoder | SceneAutoencoder


def build_vae(sizes: dict | None = None) -> Autoencoder:
    """An untrained autoencoder of the class that takes these sizes; the default is `VAE`."""
    sizes = sizes or VAE
    return SceneAutoencoder(**sizes) if "encoder_widths" in sizes else PatchAutoencoder(**sizes)


def build_text_encoder(tokenizer, sizes: dict | None = None) -> nn.Module:
    """An untrained CLIP text model; `sizes` as in `TEXT`, which is the default."""
    from transformers import CLIPTextConfig, CLIPTextModel

    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
               "pad_token_id": tokenizer.pad_token_id}
    return CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **(sizes or TEXT), **special))


def alphas_cumprod() -> Tensor:
    """Cumulative alphas of Stable Diffusion's schedule, `[1000]`."""
    return cumulative_alphas(SCHEDULE["beta_start"], SCHEDULE["beta_end"], SCHEDULE["num_train_timesteps"],
                             SCHEDULE["beta_schedule"])

"""Sizes and plans of the 128-pixel bases. The sizes are stored with the weights, the plans are not."""

from __future__ import annotations

from ...core.demo import networks
from .long_run import Plan

PICTURE = 128
CHANNELS = 24  # of latents; with fewer, lines of two pixels did not survive a round trip
SHARDS = 40
AUTOENCODER_SHARDS = (37, 38, 39)  # rendered first; the autoencoder learns on them

AUTOENCODER = {
    "latent_channels": CHANNELS,
    "encoder_widths": (64, 96),
    "encoder_blocks": 2,
    "decoder_widths": (112, 64, 32),
    "decoder_blocks": (3, 2, 2),
}
# Attention on all three levels. At 16x16 it relates the parts of an outline or pattern to one another.
UNET = networks.UNET | {
    "sample_size": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "block_out_channels": (96, 128, 128),
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
}
TRANSFORMER = {
    "in_channels": CHANNELS,
    "model_channels": 192,
    "num_blocks": 10,
    "num_heads": 6,
    "crossattn_emb_channels": networks.TEXT_WIDTH,
    "adaln_lora_dim": 64,
    "rope_ratio": 0.0125,  # 1/20 to 1 radian per token, for 8 tokens a side
}
# Joint attention in the form of Flux.2, 6.1 million weights. 8 channels of a head per axis.
JOINT = {
    "in_channels": CHANNELS,
    "hidden_size": 192,
    "depth": 2,
    "depth_single_blocks": 7,
    "num_heads": 6,
    "context_in_dim": networks.TEXT_WIDTH,
    "mlp_ratio": 3.0,
    "theta": 50.0,  # 1/19 to 1 radian per token, for 8 tokens a side
}
TIME_SCALE = 1000.0  # the transformer's times are sigma times this, ComfyUI's `multiplier`; JOINT: 1

AUTOENCODER_PLAN = Plan(1000, 1.5e-3, decay=0.4, muon=True)
DECODER_PLAN = Plan(6000, 1.0e-3, decay=0.6, muon=True)
# About 2 seconds a step for the UNet and 1 second for the transformers, on one core: 3, 4 and 1.6 hours.
# The transformer that ships reached 7,800 steps with a plan of so many, and went on from there with this one.
# The one with joint attention had a plan of 4,400 steps until step 3,800.
UNET_PLAN = Plan(5300, 1.0e-3, ema=0.9995, muon=True)
TRANSFORMER_PLAN = Plan(14400, 1.0e-3, decay=0.28, ema=0.999, muon=True)
JOINT_PLAN = Plan(6000, 1.0e-3, decay=0.4, ema=0.999, muon=True)

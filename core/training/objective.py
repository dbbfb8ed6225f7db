"""The denoising loss of one batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.batch import Batch
from ..methods.base import Forward
from ..model.backbone import Backbone
from ..model.context import Context
from ..model.processor import AttentionProcessor
from .config import TrainingConfig


@dataclass(frozen=True)
class Draw:
    """The random part of a batch: timesteps `[B]` and noise `[B, C, h, w]`."""

    timesteps: Tensor
    noise: Tensor


def draw(batch: Batch, timesteps: int, config: TrainingConfig, generator: torch.Generator) -> Draw:
    """Draws timesteps below `timesteps` as `timestep_sampling` says, and Gaussian noise.

    Logit-normal timesteps are `timesteps` times the sigmoid of a normal number (Stable Diffusion 3, Esser et
    al. 2024). With `noise_offset` a constant per sample and channel is added to the noise, as in CIDM's
    released code. It lets the model learn the overall brightness of pictures.
    """
    latents = batch.latents
    if config.timestep_sampling == "logit-normal":
        middle = torch.randn(len(latents), generator=generator).sigmoid()
        t = (middle * timesteps).long().clamp(max=timesteps - 1)
    else:
        t = torch.randint(timesteps, (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    if config.noise_offset > 0:
        noise = noise + config.noise_offset * torch.randn(*latents.shape[:2], 1, 1, generator=generator)
    return Draw(t.to(latents.device), noise.to(latents.device))


def predict(backbone: Backbone, batch: Batch, context: Context, drawn: Draw,
            processor: AttentionProcessor | None, precision: torch.dtype | None = None) -> Forward:
    """Runs one forward pass of a batch at its drawn timesteps and noise. precision: autocast's type."""
    schedule = backbone.schedule
    noisy = schedule.add_noise(batch.latents, drawn.noise, drawn.timesteps)
    target = schedule.target(batch.latents, drawn.noise, drawn.timesteps)
    output = backbone.predict(noisy, drawn.timesteps, context, processor)
    return Forward(batch, context, drawn.timesteps, noisy, target, output, precision)


def denoising_loss(backbone: Backbone, seen: Forward, config: TrainingConfig) -> Tensor:
    """Computes the masked mean squared error between the UNet's output and its target.

    Args:
        backbone: Its schedule determines the Min-SNR weights (Hang et al. 2023).
        seen: A forward pass. Each sample's error is divided by the mask's area, so that small masks have the
            same weight.
        config: `min_snr_gamma` 0 turns Min-SNR weighting off.

    Returns:
        Mean over the batch with the samples' weights, a scalar with gradient.
    """
    masks, output = seen.batch.masks, seen.output
    area = masks.sum((1, 2, 3)).clamp(min=1e-6) * output.shape[1]
    per_sample = ((output.float() - seen.target).square() * masks).sum((1, 2, 3)) / area
    weights = seen.batch.weights.to(per_sample)
    if config.min_snr_gamma > 0:
        by_snr = backbone.schedule.min_snr_weights(seen.timesteps, config.min_snr_gamma)
        weights = weights * by_snr.to(per_sample)
    return (per_sample * weights).mean()

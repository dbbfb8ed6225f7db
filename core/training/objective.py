"""The denoising loss of one batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..hosts.backbone import Backbone, Context, SiteProgram
from ..methods.base import Batch
from .config import TrainingConfig


@dataclass(frozen=True)
class Draw:
    """The random part of a batch: timesteps `[B]` and noise `[B, C, h, w]`."""

    timesteps: Tensor
    noise: Tensor


def draw(batch: Batch, timesteps: int, config: TrainingConfig, generator: torch.Generator) -> Draw:
    """Uniform timesteps; noise with CIDM's offset (a constant per channel, which lets overall brightness move)."""
    latents = batch.latents
    t = torch.randint(timesteps, (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    if config.noise_offset > 0:
        noise = noise + config.noise_offset * torch.randn(*latents.shape[:2], 1, 1, generator=generator)
    return Draw(t.to(latents.device), noise.to(latents.device))


def denoising_loss(backbone: Backbone, batch: Batch, context: Context, drawn: Draw, program: SiteProgram, config: TrainingConfig) -> Tensor:
    """Masked MSE between the UNet's output and its target, normalised by mask area, times sample and Min-SNR weights; batch mean."""
    schedule = backbone.schedule
    noisy = schedule.add_noise(batch.latents, drawn.noise, drawn.timesteps)
    target = schedule.target(batch.latents, drawn.noise, drawn.timesteps)
    output = backbone.predict(noisy, drawn.timesteps, context, program)
    area = batch.masks.sum((1, 2, 3)).clamp(min=1e-6) * output.shape[1]
    per_sample = ((output.float() - target).square() * batch.masks).sum((1, 2, 3)) / area
    weights = batch.weights.to(per_sample)
    if config.min_snr_gamma > 0:
        weights = weights * schedule.min_snr_weights(drawn.timesteps, config.min_snr_gamma).to(per_sample)
    return (per_sample * weights).mean()

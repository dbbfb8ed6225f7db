"""The denoising loss of one batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.batch import Batch
from ..methods.base import Forward
from ..model.backbone import AttentionProcessor, Backbone, Context
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


def predict(backbone: Backbone, batch: Batch, context: Context, drawn: Draw, processor: AttentionProcessor | None) -> Forward:
    """One forward pass of a batch with its drawn noise."""
    schedule = backbone.schedule
    noisy = schedule.add_noise(batch.latents, drawn.noise, drawn.timesteps)
    target = schedule.target(batch.latents, drawn.noise, drawn.timesteps)
    return Forward(batch, context, drawn.timesteps, noisy, target, backbone.predict(noisy, drawn.timesteps, context, processor))


def denoising_loss(backbone: Backbone, seen: Forward, config: TrainingConfig) -> Tensor:
    """Masked MSE between the UNet's output and its target, normalised by mask area, times sample and Min-SNR weights; batch mean."""
    masks, output = seen.batch.masks, seen.output
    area = masks.sum((1, 2, 3)).clamp(min=1e-6) * output.shape[1]
    per_sample = ((output.float() - seen.target).square() * masks).sum((1, 2, 3)) / area
    weights = seen.batch.weights.to(per_sample)
    if config.min_snr_gamma > 0:
        weights = weights * backbone.schedule.min_snr_weights(seen.timesteps, config.min_snr_gamma).to(per_sample)
    return (per_sample * weights).mean()

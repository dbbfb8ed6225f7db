"""Stages 1 and 4: the autoencoder of the 128-pixel bases, first as a whole, later the decoder alone.

The encoder is final after stage 1, because all latents depend on it. The decoder can be trained further on
noisy latents, which resemble those of a diffusion model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.demo import base
from ...core.demo.autoencoder import SceneAutoencoder
from ...core.demo.bases import FILES
from .autoencoder import fit_linear, reconstruction_loss
from .data import to_tensor
from .long_run import LongRun, Plan, load_average
from .pictures import load_shard

EVENING = 0.65
FITTED_ON = 1500
CORRECTION_WEIGHT = 0.01  # of the mean square of the encoder network's correction to the linear code
LATENT_ERROR = 0.15  # largest spread of noise on latents while learning, in units of their spread
CROP = 64


def fitted(config: dict, pictures: np.ndarray) -> SceneAutoencoder:
    """An autoencoder whose linear parts are solved and frozen, and whose networks add nothing yet."""
    autoencoder = SceneAutoencoder(**config)
    fit_linear(autoencoder, pictures[:FITTED_ON], EVENING)
    for part in (autoencoder.encoder, autoencoder.linear):
        part.requires_grad_(False)
    return autoencoder


def random_crops(pictures: np.ndarray, batch: int, rng: np.random.Generator, side: int = CROP) -> Tensor:
    """`[batch, 3, side, side]` in -1..1, half of them mirrored."""
    size = pictures.shape[1]
    chosen = rng.integers(0, len(pictures), batch)
    rows, columns = rng.integers(0, size - side + 1, (2, batch))
    crops = [pictures[i, r : r + side, c : c + side] for i, r, c in zip(chosen, rows, columns, strict=True)]
    mirrored = rng.random(batch) < 0.5
    return to_tensor(np.stack([crop[:, ::-1] if flip else crop
                               for crop, flip in zip(crops, mirrored, strict=True)]))


def disturbed(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Adds white noise of a random spread to every picture's latents."""
    spread = LATENT_ERROR * torch.rand(len(latents), 1, 1, 1, generator=generator)
    return latents + spread * torch.randn(latents.shape, generator=generator)


def _decode(autoencoder: SceneAutoencoder, latents: Tensor) -> Tensor:
    with torch.no_grad() if not latents.requires_grad else torch.enable_grad():
        plain = F.pixel_shuffle(autoencoder.linear(latents), autoencoder.patch)
    with torch.autocast("cpu", torch.bfloat16):
        detail = autoencoder.detail(latents)
    return plain + detail.float()


def train_both(config: dict, pictures: np.ndarray, folder: Path, plan: Plan, stop: Callable[[], bool],
               batch: int = 32) -> LongRun:
    """Encoder and decoder on crops of `pictures` `[N, size, size, 3]`; returns the run, finished or not."""
    torch.manual_seed(0)
    autoencoder = fitted(config, pictures).to(memory_format=torch.channels_last)
    run = LongRun(autoencoder, folder, "autoencoder", plan, stop)
    rng, generator = np.random.default_rng(run.start), torch.Generator().manual_seed(run.start)
    for _ in run:
        x = random_crops(pictures, batch, rng).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            correction = autoencoder.refine(x)
        correction = correction.float()
        latents = autoencoder.encoder(x) + correction
        output = _decode(autoencoder, disturbed(latents, generator))
        run.learn(reconstruction_loss(output, x) + CORRECTION_WEIGHT * correction.square().mean())
    return run


def load_trained(config: dict, pictures: np.ndarray, folder: Path) -> SceneAutoencoder:
    """The autoencoder with averaged weights of stage 1 and, where it has begun, of stage 4."""
    autoencoder = fitted(config, pictures)
    load_average(autoencoder, folder, "autoencoder")
    load_average(autoencoder.detail, folder, "decoder")
    return autoencoder.eval()


def shipped() -> SceneAutoencoder:
    """The autoencoder of the embedded base of 128 pixels. It spares a further base the first stage."""
    return base.load_modules(FILES["embedded-128"])["vae"].eval()


def train_decoder(config: dict, pictures: np.ndarray, folder: Path, plan: Plan, stop: Callable[[], bool],
                  batch: int = 12) -> LongRun:
    """The decoder alone, on whole pictures; returns the run."""
    torch.manual_seed(1)
    autoencoder = load_trained(config, pictures, folder).requires_grad_(False)
    autoencoder.to(memory_format=torch.channels_last)
    detail: nn.Module = autoencoder.detail.requires_grad_(True)
    run = LongRun(detail, folder, "decoder", plan, stop)
    rng, generator = np.random.default_rng(10**6 + run.start), torch.Generator().manual_seed(run.start)
    for _ in run:
        x = random_crops(pictures, batch, rng, pictures.shape[1]).to(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents = autoencoder.encode(x).latent_dist.mean.float()
        run.learn(reconstruction_loss(_decode(autoencoder, disturbed(latents, generator)), x))
    return run


@torch.no_grad()
def encode_shards(autoencoder: SceneAutoencoder, pictures: Path, latents: Path, numbers: list[int]) -> None:
    """Writes latents `[SHARD, C, h, w]` fp16 of every shard that has none yet."""
    latents.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        target = latents / f"latents_{number:03d}.npy"
        if target.exists():
            continue
        images = load_shard(pictures, number).pictures
        codes = [autoencoder.encode(to_tensor(images[i : i + 100])).latent_dist.mean.half()
                 for i in range(0, len(images), 100)]
        partial = target.with_suffix(".partial.npy")
        np.save(partial, torch.cat(codes).numpy())
        partial.rename(target)

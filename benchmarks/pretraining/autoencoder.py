"""Stage 1: the autoencoder. Its linear part has a closed form; only the decoder's detail network is trained.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.demo import networks
from ...core.demo.autoencoder import SceneAutoencoder
from .data import to_tensor
from .loop import Run

# 0: principal directions keep their strength; 1: all directions have the same strength
EVENING = 0.25
EDGE_WEIGHT = 0.5
# maximum noise on the decoder's latents, relative to their spread, because diffusion latents are imperfect
LATENT_ERROR = 0.15
FITTED_ON = 4000


@torch.no_grad()
def fit_linear(vae: networks.PatchAutoencoder | SceneAutoencoder, pictures: np.ndarray,
               evening: float = EVENING) -> None:
    """Sets encoder and linear decoder from the principal directions of patches.

    Latents have unit variance on average.

    Args:
        vae: gets the new weights.
        pictures: `[N, H, W, 3]` uint8; the first `FITTED_ON` are used.
        evening: see `EVENING`.
    """
    x = F.pixel_unshuffle(to_tensor(pictures[:FITTED_ON]), vae.patch).transpose(0, 1).flatten(1).double()
    mean = x.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(x))
    channels = vae.config.latent_channels
    values, vectors = values.flip(0)[:channels], vectors.flip(1)[:, :channels]
    strength = values.pow(-evening / 2) / values.pow(1 - evening).mean().sqrt()
    down, up = (vectors * strength).T, vectors / strength
    # pixel_unshuffle orders a patch as [colour, row, column], as a convolution's kernel does.
    vae.encoder.weight.copy_(down.view_as(vae.encoder.weight))
    vae.encoder.bias.copy_(-down @ mean)
    vae.linear.weight.copy_(up.view_as(vae.linear.weight))
    vae.linear.bias.copy_(mean)


def _edges(x: Tensor) -> Tensor:
    return torch.cat([(x[..., 1:, :] - x[..., :-1, :]).flatten(1), (x[..., 1:] - x[..., :-1]).flatten(1)],
                     dim=1)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + L2 on pixels, and L1 on differences of neighbouring pixels, because edges matter most in drawings.
    """
    difference = output - target
    edges = (_edges(output) - _edges(target)).abs().mean()
    return difference.abs().mean() + difference.square().mean() + EDGE_WEIGHT * edges


def train(pictures: np.ndarray, folder: Path, steps: int, batch: int = 32, seed: int = 0) -> nn.Module:
    """Trains the decoder's detail network on latents with noise of random strength.

    Runs in one process, for a few minutes on one core.
    """
    torch.manual_seed(seed)
    vae = networks.build_vae()
    fit_linear(vae, pictures)
    run = Run(nn.ModuleDict({"detail": vae.detail}), folder / "autoencoder.pt", steps, lr=2e-3)
    generator = torch.Generator().manual_seed(1009 * (seed + run.start))
    for _ in run:
        x = to_tensor(pictures[torch.randint(len(pictures), (batch,), generator=generator).numpy()])
        latents = vae.encode(x).latent_dist.mean.detach()
        spread = LATENT_ERROR * torch.rand(batch, 1, 1, 1, generator=generator)
        noisy = latents + spread * torch.randn(latents.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            detail = vae.detail(noisy)
        output = F.pixel_shuffle(vae.linear(noisy).detach() + detail.float(), networks.PATCH)
        run.after(reconstruction_loss(output, x))
    run.ema.copy_into_modules()
    return vae.eval()


@torch.no_grad()
def encode_all(vae: nn.Module, pictures: np.ndarray, batch: int = 1000) -> Tensor:
    """Encodes all pictures to latents `[N, 12, 16, 16]` fp16."""
    return torch.cat([vae.encode(to_tensor(pictures[i : i + batch])).latent_dist.mean.half()
                      for i in range(0, len(pictures), batch)])

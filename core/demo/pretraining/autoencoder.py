"""Stage 1: the autoencoder, 64×64×3 pictures to 16×16×4 latents (L1 + L2, a light KL term to keep latents smooth)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import networks
from .data import to_tensor
from .loop import Run

KL_WEIGHT = 1e-5      # 1e-3 already switches a colour axis off
EDGE_WEIGHT = 0.5


def _edges(x: Tensor) -> Tensor:
    return torch.cat([(x[..., 1:, :] - x[..., :-1, :]).flatten(1), (x[..., 1:] - x[..., :-1]).flatten(1)], dim=1)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + L2 on pixels and L1 on differences of neighbours (edges carry the drawing)."""
    difference = output - target
    return difference.abs().mean() + difference.square().mean() + EDGE_WEIGHT * (_edges(output) - _edges(target)).abs().mean()


def train(pictures: np.ndarray, folder: Path, steps: int, batch: int = 16, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)      # every process starts from the same weights
    rank = dist.get_rank() if dist.is_initialized() else 0
    modules = nn.ModuleDict({"vae": networks.build_vae()})
    run = Run(modules, folder / "autoencoder.pt", steps, lr=2e-3)
    generator = torch.Generator().manual_seed(1009 * (seed + run.start) + rank)
    for _ in run:
        x = to_tensor(pictures[torch.randint(len(pictures), (batch,), generator=generator).numpy()])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = modules["vae"].encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            output = modules["vae"].decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        run.after(reconstruction_loss(output.float(), x) + KL_WEIGHT * kl)
    run.ema.copy_into_modules()
    return modules["vae"].eval()


@torch.no_grad()
def encode_all(vae: nn.Module, pictures: np.ndarray, batch: int = 250) -> tuple[Tensor, float]:
    """Latents of every picture `[N, 4, 16, 16]` fp16, scaled to unit variance, and that scale."""
    parts = []
    for start in range(0, len(pictures), batch):
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(vae.encode(to_tensor(pictures[start:start + batch])).latent_dist.mean.half())
    latents = torch.cat(parts)
    scale = 1.0 / float(latents[:5000].float().std())
    return (latents.float() * scale).half(), scale

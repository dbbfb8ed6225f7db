"""Stage 1: the autoencoder, 64×64×3 pictures to 16×16×8 latents (L1 + L2, a light KL term to keep latents smooth)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import networks
from .data import to_tensor
from .loop import Run

KL_WEIGHT = 1e-5  # 1e-3 already switches a colour axis off
EDGE_WEIGHT = 0.5
# Rows: brightness and two colour differences. Colour counts double, else it is learned long after the outlines.
COLOUR_AXES = torch.tensor([[0.299, 0.587, 0.114], [1.0, -1.0, 0.0], [-0.5, -0.5, 1.0]])


def _edges(x: Tensor) -> Tensor:
    return torch.cat([(x[..., 1:, :] - x[..., :-1, :]).flatten(1), (x[..., 1:] - x[..., :-1]).flatten(1)], dim=1)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + L2 on pixels, L1 along brightness and colour axes, L1 on differences of neighbours (edges carry the drawing)."""
    difference = output - target
    along = torch.einsum("ac,bchw->bahw", COLOUR_AXES, difference).abs().mean()
    return difference.abs().mean() + difference.square().mean() + along + EDGE_WEIGHT * (_edges(output) - _edges(target)).abs().mean()


def train(pictures: np.ndarray, folder: Path, steps: int, batch: int = 16, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)  # every process starts from the same weights
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
def encode_all(vae: nn.Module, pictures: np.ndarray, batch: int = 100) -> Tensor:
    """Latent means of every picture `[N, 8, 16, 16]` float32, unscaled."""
    parts = []
    for start in range(0, len(pictures), batch):
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(vae.encode(to_tensor(pictures[start : start + batch])).latent_dist.mean.float())
    return torch.cat(parts)


LATENT_ERROR = 0.1  # spread of the noise on refined latents, in units of the diffusion model's latents: about what it leaves


def refine_decoder(vae: nn.Module, pictures: np.ndarray, cached: dict[str, Tensor], folder: Path, steps: int, batch: int = 16) -> None:
    """Trains the decoder on with the encoder (and so the cached latents) fixed, on latents as imperfect as generated ones.

    cached: `latents` `[N, 8, 16, 16]` with `mean` and `matrix` of export.whitened.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    modules = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    run = Run(modules, folder / "decoder.pt", steps, lr=1.5e-3)
    generator = torch.Generator().manual_seed(2003 * (1 + run.start) + rank)
    undo, mean = torch.linalg.inv(cached["matrix"]), cached["mean"].view(1, -1, 1, 1)
    for _ in run:
        index = torch.randint(len(pictures), (batch,), generator=generator)
        latents = cached["latents"][index].float()
        spread = LATENT_ERROR * torch.rand(batch, 1, 1, 1, generator=generator)
        latents = latents + spread * torch.randn(latents.shape, generator=generator)
        latents = torch.einsum("ac,bchw->bahw", undo, latents) + mean
        with torch.autocast("cpu", torch.bfloat16):
            output = modules["decoder"](modules["post_quant_conv"](latents))
        run.after(reconstruction_loss(output.float(), to_tensor(pictures[index.numpy()])))

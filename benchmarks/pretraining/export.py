"""Stage 3: writes the averaged weights to the shipped file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from ...core.demo import base
from . import autoencoder


@torch.no_grad()
def averaged(module: nn.Module, checkpoint: dict, part: str) -> nn.Module:
    for name, parameter in module.named_parameters():
        parameter.copy_(checkpoint["ema"][f"{part}.{name}"])
    return module


def trained_autoencoder(folder: Path, pictures: np.ndarray) -> nn.Module:
    vae = base.build_modules()["vae"]
    autoencoder.fit_linear(vae, pictures)
    averaged(vae.detail, torch.load(folder / "autoencoder.pt", weights_only=True), "detail")
    return vae.eval()


def export(folder: Path, pictures: np.ndarray, target: Path) -> None:
    """Writes the base. folder: folder with `autoencoder.pt` and `diffusion.pt` from the earlier stages."""
    modules = base.build_modules() | {"vae": trained_autoencoder(folder, pictures)}
    diffusion = torch.load(folder / "diffusion.pt", weights_only=True)
    for part in ("unet", "text_encoder"):
        averaged(modules[part], diffusion, part)
    base.save_base(modules, target, {"diffusion_steps": diffusion["step"]})

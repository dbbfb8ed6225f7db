"""Stage 3: averaged weights into the file that ships."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .. import base


@torch.no_grad()
def balance_latents(vae: nn.Module, mean: Tensor, gain: Tensor) -> None:
    """Moves `(latent - mean) * gain` per channel into the 1×1 convolutions around the latent: same pictures, balanced channels."""
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] *= gain.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) * gain
    quant.bias[channels:] += 2 * gain.log()
    post.bias += (post.weight[:, :, 0, 0] @ mean)
    post.weight /= gain.view(1, -1, 1, 1)


def _averaged(module: nn.Module, checkpoint: dict, part: str) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(checkpoint["ema"][f"{part}.{name}"])


def export(folder: Path, target: Path) -> None:
    """folder: where `autoencoder.pt`, `latents.pt` and `diffusion.pt` of the earlier stages lie."""
    modules = base.build_modules()
    autoencoder = torch.load(folder / "autoencoder.pt", weights_only=True)
    _averaged(modules["vae"], autoencoder, "vae")
    cached = torch.load(folder / "latents.pt", weights_only=True, mmap=True)
    balance_latents(modules["vae"], cached["mean"].double().float(), cached["gain"])
    modules["vae"].register_to_config(scaling_factor=1.0)
    diffusion = torch.load(folder / "diffusion.pt", weights_only=True)
    for part in ("unet", "text_encoder"):
        _averaged(modules[part], diffusion, part)
    base.save_base(modules, target, {"autoencoder_steps": autoencoder["step"], "diffusion_steps": diffusion["step"]})

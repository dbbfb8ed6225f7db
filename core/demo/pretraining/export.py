"""Stage 3: averaged weights into the file that ships."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .. import base, networks

WHITENING = 0.8  # 1 makes every direction equally strong, fine detail and noise included; 0 leaves outlines drowning colours


@torch.no_grad()
def balance_latents(vae: nn.Module, mean: Tensor, matrix: Tensor) -> None:
    """Moves `matrix @ (latent - mean)` into the 1x1 convolutions around the latent: same pictures, latents that diffuse better.

    The log-variance rows keep their channels; latents are means everywhere in this project.
    """
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels, :, 0, 0] = matrix @ quant.weight[:channels, :, 0, 0]
    quant.bias[:channels] = matrix @ (quant.bias[:channels] - mean)
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight[:, :, 0, 0] = post.weight[:, :, 0, 0] @ torch.linalg.inv(matrix)


def _averaged(module: nn.Module, checkpoint: dict, part: str) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(checkpoint["ema"][f"{part}.{name}"])


def averaged_autoencoder(folder: Path) -> nn.Module:
    """The autoencoder, with the refined decoder once there is one."""
    vae = networks.build_vae().eval()
    _averaged(vae, torch.load(folder / "autoencoder.pt", weights_only=True), "vae")
    if (folder / "decoder.pt").exists():
        refined = torch.load(folder / "decoder.pt", weights_only=True)
        _averaged(vae.decoder, refined, "decoder")
        _averaged(vae.post_quant_conv, refined, "post_quant_conv")
    return vae


def whitened(latents: Tensor, power: float = WHITENING) -> tuple[Tensor, Tensor, Tensor]:
    """`matrix @ (latents - mean)` in fp16, mean `[C]` and matrix `[C, C]`: channels decorrelated, variances evened out, 1 on average."""
    mean = latents.mean((0, 2, 3))
    flat = (latents[::7] - mean.view(1, -1, 1, 1)).transpose(0, 1).flatten(1)
    values, vectors = torch.linalg.eigh(torch.cov(flat))
    evened = values.pow(1 - power)
    matrix = vectors @ torch.diag(values.pow(-power / 2) / evened.mean().sqrt()) @ vectors.T
    return torch.einsum("ac,bchw->bahw", matrix, latents - mean.view(1, -1, 1, 1)).half(), mean, matrix


def export(folder: Path, target: Path) -> None:
    """folder: where `autoencoder.pt`, `latents.pt` and `diffusion.pt` of the earlier stages lie."""
    modules = base.build_modules() | {"vae": averaged_autoencoder(folder)}
    cached = torch.load(folder / "latents.pt", weights_only=True, mmap=True)
    balance_latents(modules["vae"], cached["mean"], cached["matrix"])
    diffusion = torch.load(folder / "diffusion.pt", weights_only=True)
    for part in ("unet", "text_encoder"):
        _averaged(modules[part], diffusion, part)
    base.save_base(modules, target, {"diffusion_steps": diffusion["step"]})

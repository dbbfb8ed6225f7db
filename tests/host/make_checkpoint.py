"""Checkpoints of random numbers in the true shapes of Stable Diffusion 1.5 and SDXL, for the stock loader.

    python tests/host/make_checkpoint.py COMFYUI_FOLDER sd15 sd15.safetensors

Where this package is installed. Names come from ComfyUI's own classes; numbers are of a size that keeps
activations finite. Same family, same file.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file

_VAE = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}


def shapes(family: str) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint under its saved name, without storage."""
    import comfy.clip_model
    import comfy.ldm.models.autoencoder as autoencoder
    import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
    import comfy.ops
    import comfy.supported_models

    from continual_concepts.benchmarks.regional.comfy_cost import SHAPES

    families = {"sd15": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}
    config = families[family](dict(SHAPES[family]))
    folder, operations = Path(comfy.clip_model.__file__).parent, comfy.ops.disable_weight_init

    def text(name: str, file: str) -> dict:
        model = comfy.clip_model.CLIPTextModel(json.loads((folder / file).read_text()), torch.float16, "meta",
                                               operations)
        return {f"{name}.transformer.{key}": weight for key, weight in model.state_dict().items()}

    with torch.device("meta"):
        unet = openaimodel.UNetModel(**SHAPES[family], dtype=torch.float16, device="meta",
                                     operations=operations).state_dict()
        vae = autoencoder.AutoencoderKL(ddconfig=_VAE, embed_dim=4).state_dict()
        clip = text("clip_l", "sd1_clip_config.json")
        if family == "sdxl":
            clip |= text("clip_g", "clip_config_bigg.json")
        clip = config.process_clip_state_dict_for_saving(clip)
    saved = config.process_unet_state_dict_for_saving(unet) | config.process_vae_state_dict_for_saving(vae)
    return saved | clip


def fill(name: str, like: torch.Tensor) -> torch.Tensor:
    """Random numbers, the same for a name and a shape: matrices of unit gain, norms 1, biases 0."""
    if not like.dtype.is_floating_point:      # position numbers
        return torch.arange(like.numel()).view(like.shape)
    if like.ndim < 2 and "projection" not in name and "embedding" not in name:
        return (torch.zeros if name.endswith("bias") else torch.ones)(like.shape, dtype=torch.float16)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    fan_in = max(1, like[0].numel()) if like.ndim > 1 else 1
    size = 0.02 if "embedding" in name else fan_in**-0.5
    return (torch.randn(like.shape, generator=generator) * size).half()


def make(family: str, path: Path) -> Path:
    """Writes the checkpoint unless it is there."""
    if not path.exists():
        save_file({name: fill(name, like) for name, like in shapes(family).items()}, str(path))
    return path


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    sys.argv[1:], (_, family, target) = [], sys.argv[1:]      # ComfyUI reads arguments too
    from comfy.cli_args import args

    args.cpu = True
    make(family, Path(target))

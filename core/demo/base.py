"""The embedded base: a small latent diffusion model that ships with the project."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..files import write_atomically
from ..hosts.diffusers import ClipText, DiffusersBackbone
from ..model.schedule import NoiseSchedule
from . import networks, vocabulary

ASSETS = Path(__file__).parent / "assets"
BASE_FILE = ASSETS / "base.safetensors"
TOKENIZER = ASSETS / "tokenizer"
PARTS = ("unet", "vae", "text_encoder")


def build_modules() -> dict[str, nn.Module]:
    """Builds untrained modules of the base, and its tokenizer under the key 'tokenizer'."""
    tokenizer = vocabulary.load(TOKENIZER)
    return {
        "unet": networks.build_unet(),
        "vae": networks.build_vae(),
        "text_encoder": networks.build_text_encoder(tokenizer),
        "tokenizer": tokenizer,
    }


def save_base(modules: dict[str, nn.Module], path: Path, notes: dict) -> None:
    """Writes one file: weights in fp16 under diffusers' names, shapes and notes as JSON metadata.

    The weights are `unet.*`, `vae.*` and `text_encoder.*`.
    """
    tensors = {
        f"{part}.{name}": tensor.half().contiguous() if tensor.is_floating_point() else tensor.contiguous()
        for part in PARTS
        for name, tensor in modules[part].state_dict().items()
        if not name.endswith("position_ids")
    }
    header = {"unet": networks.UNET, "vae": networks.VAE, "text_encoder": networks.TEXT,
              "schedule": networks.SCHEDULE, "notes": notes}
    metadata = {"continual_concepts_base": json.dumps(header)}
    write_atomically(path, lambda temporary: save_file(tensors, str(temporary), metadata))


def load_modules(path: Path = BASE_FILE) -> dict[str, nn.Module]:
    """Loads the trained modules in float32, and the tokenizer."""
    modules = build_modules()
    with safe_open(str(path), framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}
    for part in PARTS:
        weights = {key[len(part) + 1 :]: tensor.float() for key, tensor in state.items()
                   if key.startswith(f"{part}.")}
        missing, unexpected = modules[part].load_state_dict(weights, strict=False)
        if unexpected or any(not name.endswith("position_ids") for name in missing):
            raise RuntimeError(f"the embedded base does not fit its own shapes: missing {missing[:3]}, "
                               f"unexpected {unexpected[:3]}")
    return modules


def load_base(path: Path = BASE_FILE, device: str | torch.device = "cpu",
              dtype: torch.dtype = torch.float32) -> DiffusersBackbone:
    """Loads the trained base as a backbone."""
    modules = load_modules(path)
    for part in PARTS:
        modules[part].to(device)
        if dtype != torch.float32:
            modules[part].to(dtype)
    return as_backbone(modules)


def as_backbone(modules: dict) -> DiffusersBackbone:
    schedule = NoiseSchedule(networks.alphas_cumprod(), networks.SCHEDULE["prediction_type"])
    text = ClipText("clip_l", modules["text_encoder"], modules["tokenizer"], length=vocabulary.CONTEXT_LENGTH)
    return DiffusersBackbone(modules["unet"], modules["vae"], (text,), schedule)

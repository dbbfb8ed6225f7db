"""Loads a pretrained base from a folder in diffusers' layout, from disk only."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..errors import ConceptError
from ..model.schedule import NoiseSchedule, cumulative_alphas
from .diffusers import ClipText, DiffusersBackbone


def load_pretrained(folder: Path, device: torch.device | str = "cpu",
                    dtype: torch.dtype = torch.float32) -> DiffusersBackbone:
    """Loads SD1.5, SD2 or SDXL.

    Args:
        folder: Folder with subfolders unet, vae, scheduler, text_encoder and tokenizer; for SDXL also
            text_encoder_2 and tokenizer_2.
        device: Device of the modules.
        dtype: Type of the UNet and the text encoders. The autoencoder keeps its own type.

    Raises:
        ConceptError: A subfolder is missing or cannot be loaded.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder = Path(folder)
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not (folder / part).is_dir():
            raise ConceptError(f"base '{folder}' has no subfolder '{part}'; "
                               "it must be a model in diffusers' layout, or 'embedded'")
    try:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True, torch_dtype=dtype)
        vae = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True)
        has_two = (folder / "text_encoder_2").is_dir()
        first = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True,
                                              torch_dtype=dtype)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        text = [ClipText("clip_l", first.to(device), tokenizer, penultimate=has_two)]
        if has_two:
            path, options = folder / "text_encoder_2", {"local_files_only": True, "torch_dtype": dtype}
            second = CLIPTextModelWithProjection.from_pretrained(path, **options)
            tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True)
            text.append(ClipText("clip_g", second.to(device), tokenizer, penultimate=True))
        schedule = _schedule(folder / "scheduler" / "scheduler_config.json")
    except (OSError, ValueError, KeyError) as error:
        raise ConceptError(f"base '{folder}' cannot be loaded: {error}") from error
    return DiffusersBackbone(unet.to(device), vae.to(device), tuple(text), schedule)


def _schedule(file: Path) -> NoiseSchedule:
    config = json.loads(file.read_text())
    alphas = cumulative_alphas(config["beta_start"], config["beta_end"],
                               config.get("num_train_timesteps", 1000),
                               config.get("beta_schedule", "linear"))
    return NoiseSchedule(alphas, config.get("prediction_type", "epsilon"))

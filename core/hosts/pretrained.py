"""Loads a pretrained base from a folder in diffusers' layout, from disk only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import ConceptError
from ..model.schedule import SMALLEST, NoiseSchedule, cumulative_alphas, zero_terminal_snr
from .base_folder import BaseFolder
from .diffusers import ClipText, DiffusersBackbone, layout_of
from .text_encoder import load_tokenizer, named_as_in


def load_pretrained(folder: Path, device: torch.device | str = "cpu",
                    dtype: torch.dtype = torch.float32) -> DiffusersBackbone:
    """Loads SD1.5, SD2 or SDXL, or an inpainting or InstructPix2Pix model of their structure.

    Args:
        folder: Folder with subfolders unet, vae, scheduler, text_encoder and tokenizer; for SDXL also
            text_encoder_2 and tokenizer_2. Weights are .safetensors, whole or sharded; a variant such as fp16
            is read where there is no other.
        device: Device of the modules.
        dtype: Type of the UNet and the text encoders. The autoencoder keeps its own type.

    Raises:
        ConceptError: A part is missing, is of another kind, or cannot be loaded. Most faults are found before
            weights are read.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    base = BaseFolder(folder)
    schedule = noise_schedule(base.scheduler, f"base '{folder}'")
    text = [_text_encoder(base, "clip_l", CLIPTextModel, "", device, dtype)]
    if base.has_two:
        text.append(_text_encoder(base, "clip_g", CLIPTextModelWithProjection, "_2", device, dtype))
    unet = _loaded(UNet2DConditionModel, base, "unet", torch_dtype=dtype)
    vae = _loaded(AutoencoderKL, base, "vae")
    _check_widths(base, unet, text)
    return DiffusersBackbone(unet.to(device), vae.to(device), tuple(text), schedule)


def _loaded(kind: Any, base: BaseFolder, part: str, **options: Any) -> Any:
    """Loads a model of diffusers or transformers. Its weights must be complete: both libraries would fill the
    rest with random numbers.
    """
    folder, suffix = base.path / part, base.suffixes[part]
    options |= {"local_files_only": True, "use_safetensors": True, "variant": suffix}
    try:
        model, report = kind.from_pretrained(folder, output_loading_info=True, **options)
        missing = _learned(report["missing_keys"])
        if missing and part.startswith("text_encoder"):
            missing = _load_renamed(model, folder, suffix)
    except Exception as error:      # both raise arbitrary exceptions for damaged folders
        raise _unreadable(base, part, error) from error
    if missing:
        raise ConceptError(f"base '{base.path}': its {part} lacks weights, {min(missing)!r} among them; "
                           f"needed: all weights of a {kind.__name__}")
    return model


def _unreadable(base: BaseFolder, part: str, error: Exception) -> ConceptError:
    reason = " ".join(str(error).split("\n")[0].split())
    return ConceptError(f"base '{base.path}': its {part} cannot be loaded ({type(error).__name__}: {reason})")


def _load_renamed(text_encoder: Any, folder: Path, suffix: str | None) -> list[str]:
    """Loads a text encoder that another version of transformers saved. Returns the missing names."""
    weights: dict[str, Tensor] = {}
    pattern = rf"\w+\.{suffix}\b.*" if suffix else r"\w+(-\d+-of-\d+)?\.safetensors"
    for file in folder.glob("*.safetensors"):
        if re.fullmatch(pattern, file.name):
            weights |= load_file(file)
    missing, _ = text_encoder.load_state_dict(named_as_in(text_encoder, weights), strict=False)
    return _learned(missing)


def _learned(names: Iterable[str]) -> list[str]:
    """Without the numbers of positions, which some versions of transformers store beside the weights."""
    return [name for name in names if not name.endswith("position_ids")]


def _text_encoder(base: BaseFolder, name: str, kind: Any, suffix: str, device: torch.device | str,
                  dtype: torch.dtype) -> ClipText:
    """Loads a text encoder and its tokenizer from `text_encoder` and `tokenizer` with this suffix."""
    part = f"tokenizer{suffix}"
    try:
        tokenizer = load_tokenizer(base.path / part)
    except ConceptError:
        raise
    except Exception as error:      # transformers raises arbitrary exceptions for damaged files
        raise _unreadable(base, part, error) from error
    model = _loaded(kind, base, f"text_encoder{suffix}", torch_dtype=dtype).to(device)
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise ConceptError(f"base '{base.path}': its {part} has {len(tokenizer)} tokens, and its text "
                           f"encoder knows {known}; they are not of one model")
    return ClipText(name, model, tokenizer, penultimate=base.has_two)


def _check_widths(base: BaseFolder, unet: Any, text: list[ClipText]) -> None:
    read = {site.context_width for site in layout_of(unet, ()).sites}
    given = sum(encoder.width for encoder in text)
    if read != {given}:
        widths = ", ".join(map(str, sorted(read))) or "none"
        raise ConceptError(f"base '{base.path}': its text encoders give a text of width {given}, and the "
                           f"cross-attentions of its unet read width {widths}; they are not of one model")


def noise_schedule(config: Mapping[str, Any], what: str) -> NoiseSchedule:
    """The noise schedule of a diffusers scheduler's configuration, with the alphas that diffusers computes.

    Args:
        config: Of any scheduler with betas.
        what: The base's name in messages.

    Raises:
        ConceptError: The scheduler has no betas, or cannot be used with its prediction type.
    """
    kind, prediction = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    try:
        if config.get("trained_betas") is not None:
            betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
            if betas.ndim != 1 or len(betas) < 2 or not bool(((betas >= 0) & (betas <= 1)).all()):
                raise ValueError("trained_betas must be two or more numbers from 0 to 1")
            alphas = torch.cumprod(1 - betas, 0).float()
        elif kind in ("linear", "scaled_linear"):
            alphas = cumulative_alphas(config["beta_start"], config["beta_end"],
                                       config.get("num_train_timesteps", 1000), kind)
        else:
            from diffusers import DDPMScheduler

            names = ("beta_start", "beta_end", "num_train_timesteps", "beta_schedule")
            alphas = DDPMScheduler(**{name: config[name] for name in names if name in config}).alphas_cumprod
    except (KeyError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        problem = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise ConceptError(f"{what}: its scheduler {config.get('_class_name', '')} cannot be used "
                           f"({problem}); allowed: schedulers with betas") from error
    if config.get("rescale_betas_zero_snr"):
        alphas = zero_terminal_snr(alphas)
    if alphas[-1] <= SMALLEST and prediction == "epsilon":
        raise ConceptError(f"{what}: its scheduler ends in pure noise (rescale_betas_zero_snr or "
                           "trained_betas), so its prediction_type is 'epsilon' by mistake; needed: "
                           "'v_prediction'")
    return NoiseSchedule(alphas.clamp(min=SMALLEST), prediction)

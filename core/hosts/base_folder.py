"""Checks a base's folder in diffusers' layout before any weights are read."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..errors import ConceptError

_WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
            "text_encoder_2": "model"}
_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_ALLOWED = "allowed: SD1.5, SD2 or SDXL as a folder in diffusers' layout, or 'embedded'"
# what a UNet may read besides latents, time and text, and what it then is called with
_CONDITIONS = {"class_embed_type": (None,), "num_class_embeds": (None,), "encoder_hid_dim_type": (None,),
               "addition_embed_type": (None, "text_time")}


class BaseFolder:
    """A base on disk.

    Attributes:
        path: The folder.
        has_two: Whether there are two text encoders (SDXL).
        suffixes: Part -> the variant of its weight files, such as "fp16"; None for files without one.
        scheduler: The scheduler's configuration.
        context_width: Width of the text states that the UNet reads; 0 if its configuration names several.

    Raises:
        ConceptError: A part is missing, is of another kind, or has no weights that can be read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if self.path.is_file():
            raise ConceptError(f"base '{path}' is a single file; {_ALLOWED} "
                               "(diffusers' from_single_file and save_pretrained make such a folder from it)")
        if not self.path.is_dir():
            raise ConceptError(f"base '{path}' does not exist; {_ALLOWED}")
        self.has_two = (self.path / "text_encoder_2").is_dir()
        parts = (*_PARTS, "tokenizer_2") if self.has_two else _PARTS
        missing = [part for part in parts if not (self.path / part).is_dir()]
        if missing:
            inner = [*self.path.glob("*/unet"), *self.path.glob("snapshots/*/unet")]      # a hub's cache
            hint = f"; did you mean '{inner[0].parent}'?" if inner else ""
            raise ConceptError(f"base '{path}' has no subfolder {', '.join(map(repr, missing))}; {_ALLOWED}"
                               f"{hint}")
        self.scheduler = self._config("scheduler/scheduler_config.json")
        unet = self._config("unet/config.json")
        self._check_unet(unet, self._config("vae/config.json"))
        width = unet.get("cross_attention_dim", 0)
        self.context_width = width if isinstance(width, int) else 0
        weights = [part for part in _WEIGHTS if part != "text_encoder_2" or self.has_two]
        self.suffixes = {part: self._suffix(part) for part in weights}

    def _config(self, name: str) -> dict:
        try:
            config = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConceptError(f"base '{self.path}': {name} cannot be read ({error})") from error
        if not isinstance(config, dict):
            raise ConceptError(f"base '{self.path}': {name} holds no settings")
        return config

    def _check_unet(self, unet: dict, vae: dict) -> None:
        kind = unet.get("_class_name", "UNet2DConditionModel")
        if kind != "UNet2DConditionModel":
            raise ConceptError(f"base '{self.path}': its unet is a {kind}; {_ALLOWED}")
        for name, allowed in _CONDITIONS.items():
            if unet.get(name) not in allowed:
                raise ConceptError(f"base '{self.path}': its unet has {name} = {unet[name]!r} and reads more "
                                   f"than a text; {_ALLOWED}")
        if unet.get("addition_embed_type") == "text_time" and not self.has_two:
            raise ConceptError(f"base '{self.path}' has no subfolder 'text_encoder_2', whose text its unet "
                               f"reads; {_ALLOWED}")
        check_channels(f"base '{self.path}'", unet.get("in_channels", 4), vae.get("latent_channels", 4))

    def _suffix(self, part: str) -> str | None:
        """The variant of a part's weights that is read: none, else fp16, else the first by name."""
        stem = _WEIGHTS[part]
        # of pieces: early diffusers put the variant before "index"
        index = rf"{stem}\.safetensors(?:\.index(?:\.(\w+))?|\.(\w+)\.index)\.json"
        pattern = rf"{stem}(?:\.(\w+))?\.safetensors|{index}"
        names = sorted(file.name for file in (self.path / part).iterdir())
        matches = [match for name in names if (match := re.fullmatch(pattern, name))]
        found = [match[1] or match[2] or match[3] for match in matches]
        if None in found:
            return None
        if found:
            return "fp16" if "fp16" in found else found[0]
        pickled = [name for name in names if name.endswith((".bin", ".ckpt", ".pt", ".pth"))]
        has = f"only {pickled[0]}, and pickled files are not read" if pickled else "no weights"
        raise ConceptError(f"base '{self.path}': its {part} has {has}; needed: {stem}.safetensors, or a "
                           f"variant such as {stem}.fp16.safetensors")


def check_channels(what: str, unet: int, latents: int) -> None:
    """Raises ConceptError unless a UNet reads latents alone, or what `extra_channels` adds to them.

    Args:
        what: The base's name in messages.
        unet: Channels that the UNet reads.
        latents: Channels of a latent.
    """
    if unet not in (latents, 2 * latents, 2 * latents + 1):
        raise ConceptError(f"{what}: its unet reads {unet} channels; allowed: {latents} (latents), "
                           f"{2 * latents} (with a picture, InstructPix2Pix) and {2 * latents + 1} (with a "
                           "picture and a mask, inpainting)")

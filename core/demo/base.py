"""The embedded base: a small latent diffusion model that ships with the project."""

from __future__ import annotations

import json
import random
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..bank.concepts import ConceptInfo
from ..bank.hints import notes_on_base
from ..errors import ConceptError
from ..files import write_atomically
from ..hosts.diffusers import ClipText, DiffusersBackbone
from ..hosts.joint import JointBackbone
from ..hosts.modules import ModuleBackbone
from ..hosts.text_encoder import named_as_in
from ..hosts.transformer import TransformerBackbone
from ..model.flow import FlowSchedule
from ..model.schedule import NoiseSchedule
from ..model.sites import SiteLayout
from . import networks, scenes, vocabulary
from .bases import EMBEDDED, HEADER, NAMES, TOKENIZER, file_of, read_sizes, whole
from .joint_transformer import JointTransformer
from .packing import pack, unpack
from .transformer import DiffusionTransformer

BASE_FILE = file_of(EMBEDDED)
TRANSFORMER_CLASSES: dict[str, type[nn.Module]] = {"transformer": DiffusionTransformer,
                                                  "joint": JointTransformer}
DENOISERS = ("unet", *TRANSFORMER_CLASSES)
PACKED = (*DENOISERS, "vae")      # parts that `save_base` can store in eight bits
# of the base of 64 pixels
SIZES: dict[str, Any] = {"unet": networks.UNET, "vae": networks.VAE, "text_encoder": networks.TEXT,
                         "schedule": networks.SCHEDULE, "picture_size": networks.PICTURE_SIZE}


def build_modules(sizes: dict | None = None) -> dict[str, Any]:
    """Builds untrained modules of the given sizes, and the tokenizer under the key 'tokenizer'.

    Args:
        sizes: the arguments of the denoiser, one of `DENOISERS`, and of 'vae' and 'text_encoder', as a base
            file's header holds them; the default is `SIZES`.
    """
    sizes, tokenizer = sizes or SIZES, vocabulary.load(TOKENIZER)
    kind = next(name for name in DENOISERS if name in sizes)
    build = networks.build_unet if kind == "unet" else lambda shape: TRANSFORMER_CLASSES[kind](**shape)
    return {
        kind: build(sizes[kind]),
        "vae": networks.build_vae(sizes["vae"]),
        "text_encoder": networks.build_text_encoder(tokenizer, sizes["text_encoder"]),
        "tokenizer": tokenizer,
    }


def _with_weights(modules: dict[str, Any]) -> dict[str, nn.Module]:
    return {part: module for part, module in modules.items() if part != "tokenizer"}


def save_base(modules: dict[str, Any], path: Path, notes: dict, sizes: dict | None = None,
              packed: bool = False) -> None:
    """Writes one file: weights as `part.name` under diffusers' names, sizes and notes as JSON metadata.

    Args:
        modules: by part, as `build_modules` returns them; the tokenizer is not stored.
        path: of the file.
        notes: how the base was trained.
        sizes: of the modules, and the 'schedule'; the default is `SIZES`.
        packed: store the parts in `PACKED` in eight bits (see `packing`); all others are fp16.
    """
    tensors: dict[str, Tensor] = {}
    for part, module in _with_weights(modules).items():
        state = {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()
                 if not name.endswith("position_ids")}
        if packed and part in PACKED:
            tensors |= pack(state)
            continue
        tensors |= {name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
                    for name, tensor in state.items()}
    metadata = {HEADER: json.dumps({**(sizes or SIZES), "notes": notes})}
    write_atomically(path, lambda temporary: save_file(tensors, str(temporary), metadata))


def load_modules(path: Path = BASE_FILE) -> dict[str, Any]:
    """Loads the trained modules in float32, with the sizes in the file's header, and the tokenizer.

    Raises:
        ConceptError: The file is missing or damaged, or its header names no denoiser that is known.
    """
    sizes = read_sizes(path)
    if not any(kind in sizes for kind in DENOISERS):
        raise ConceptError(f"base '{path.name}' names the parts {', '.join(sizes)}, but no denoiser; "
                           f"allowed: {', '.join(DENOISERS)}")
    modules = build_modules(sizes)
    with whole(path):
        state = unpack(load_file(path))
    for part, module in _with_weights(modules).items():
        weights = {key[len(part) + 1 :]: tensor for key, tensor in state.items()
                   if key.startswith(f"{part}.")}
        if part == "text_encoder":
            weights = named_as_in(module, weights)
        missing, unexpected = module.load_state_dict(weights, strict=False)
        if unexpected or any(not name.endswith("position_ids") for name in missing):
            raise RuntimeError(f"the embedded base does not fit its own shapes: missing {missing[:3]}, "
                               f"unexpected {unexpected[:3]}")
    return modules


def load_base(path: Path = BASE_FILE, device: str | torch.device = "cpu",
              dtype: torch.dtype = torch.float32) -> ModuleBackbone:
    """Loads a trained base as a backbone; its file says what it is.

    Args:
        path: of the file.
        device: of the modules.
        dtype: of the modules. A transformer's must be float32.
    """
    modules, sizes = load_modules(path), read_sizes(path)
    if dtype != torch.float32 and "unet" not in modules:
        raise ConceptError(f"type {dtype} was asked for base '{path.name}', which is a transformer; allowed: "
                           "torch.float32")
    for module in _with_weights(modules).values():
        module.to(device)
        if dtype != torch.float32:
            module.to(dtype)
    return as_backbone(modules, sizes)


@cache
def _fingerprint(name: str) -> str:
    return load_base(file_of(name)).fingerprint


def notes_on_weights(infos: Collection[ConceptInfo], layout: SiteLayout) -> list[str]:
    """A note if concepts were learned on other weights of an embedded base, where no base is loaded; see
    `hints.notes_on_base`. It loads the embedded base once per process, which takes about a second."""
    if layout.embedded_base not in NAMES or not any(info.provenance.base for info in infos):
        return []
    return notes_on_base(infos, layout, _fingerprint(layout.embedded_base))


def as_backbone(modules: dict, sizes: dict | None = None) -> ModuleBackbone:
    """Modules as `build_modules` returns them, as a backbone. sizes: as there; a transformer's schedule and
    picture size are read from them.
    """
    sizes = sizes or SIZES
    text = ClipText("clip_l", modules["text_encoder"], modules["tokenizer"], length=vocabulary.CONTEXT_LENGTH)
    backbone: ModuleBackbone
    if "unet" in modules:
        schedule = NoiseSchedule(networks.alphas_cumprod(), networks.SCHEDULE["prediction_type"])
        backbone = DiffusersBackbone(modules["unet"], modules["vae"], (text,), schedule)
    else:
        flow, kind = sizes["schedule"], next(kind for kind in TRANSFORMER_CLASSES if kind in modules)
        host = TransformerBackbone if kind == "transformer" else JointBackbone
        backbone = host(modules[kind], modules["vae"], text, FlowSchedule.shifted(flow["shift"]),
                        sizes["picture_size"], flow["multiplier"])
    rng = random.Random(0)
    backbone.known_prompts = tuple(scenes.caption(scenes.random_scene(rng), rng) for _ in range(32))
    return backbone

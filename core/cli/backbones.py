"""Loads the base of a command, and default settings for the embedded base."""

from __future__ import annotations

import difflib
import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..bank.format import METADATA_KEY, SUFFIX, open_bank
from ..demo.bases import EMBEDDED, HEADER, NAMES, NEWEST, TRANSFORMERS, file_of, picture_size
from ..errors import ConceptError
from ..files import check_output
from ..hosts.base_folder import BaseFolder
from ..hosts.modules import ModuleBackbone
from ..training import presets
from ..training.config import TrainingConfig
from ..training.process_group import own_device

EMBEDDED_SIZE, EMBEDDED_CFG = picture_size(), 3.0
EMBEDDED_TRAINING = TrainingConfig(resolution=EMBEDDED_SIZE, steps=500, batch_size=4, schedule="cosine",
                                   warmup=20)
EMBEDDED_RATES = presets.EMBEDDED_RATES
OTHER_SIZE, OTHER_CFG = 512, 7.5
PRESETS = presets.SHORT_NAMES


def is_embedded(options: Namespace) -> bool:
    return options.base in NAMES or options.base in TRANSFORMERS


def embedded_name(options: Namespace) -> str:
    """Name of a command's embedded base: the one that its bank was made on, unless `--base` names another.

    A bank that cannot be read counts as none; the command itself says what is wrong with it.
    """
    if options.base != EMBEDDED:
        return options.base
    try:
        made_on = open_bank(options.bank).layout.embedded_base if getattr(options, "bank", None) else ""
    except ConceptError:
        made_on = ""
    return made_on if made_on in NAMES else NEWEST


def called(options: Namespace) -> str:
    """What the command calls its embedded base: its name as typed, and which one that is."""
    name = embedded_name(options)
    return name if options.base == name else f"{options.base} ({name})"


def _folder_of(options: Namespace) -> BaseFolder:
    """The folder of a base that does not ship. Raises ConceptError if it cannot be used."""
    path = Path(options.base).expanduser()
    if path.is_file():
        _refuse_own_file(path, options.base)
    if not os.path.lexists(path):
        typed = options.base.strip().lower().replace("_", "-")
        near = [name for name in NAMES if name.endswith(f"-{typed}")]
        near = near or difflib.get_close_matches(typed, NAMES, n=1, cutoff=0.8)
        hint = f"did you mean '{near[0]}'? Allowed" if near else "allowed"
        raise ConceptError(f"base '{options.base}' does not exist; {hint}: {', '.join(NAMES)}, or SD1.5, SD2 "
                           "or SDXL as a folder in diffusers' layout")
    return BaseFolder(path)


def _refuse_own_file(path: Path, given: str) -> None:
    """Raises ConceptError for a file of ours that `--base` does not take: an embedded base, or a bank."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return
    if HEADER in metadata:
        raise ConceptError(f"base '{given}' is the file of an embedded base; give its name: "
                           f"{', '.join(NAMES[1:])}")
    if METADATA_KEY in metadata:
        raise ConceptError(f"base '{given}' is a concept bank; give it with --bank, and as base "
                           f"{', '.join(NAMES)}, or SD1.5, SD2 or SDXL as a folder in diffusers' layout")


def bank_output(path: Path) -> Path:
    """The file of a bank that will be written. Raises ConceptError if it cannot be, or if a new one has
    another ending than ComfyUI lists; files with other endings that exist are kept."""
    file = check_output(path, "bank")
    if file.suffix.lower() != SUFFIX and not file.exists():
        raise ConceptError(f"the bank '{path}' does not end in {SUFFIX}, so ComfyUI would not list it; give "
                           "it this ending")
    return file


def preset_of(options: Namespace) -> presets.Preset | None:
    """The preset that the options name, for the family of the base; None if they name none.

    Raises:
        ConceptError: `--effort` is given alone, or `--kind` is not the preset's.
    """
    if getattr(options, "preset", None) is None:
        if getattr(options, "effort", None) is not None:
            raise ConceptError(f"--effort is '{options.effort}', and no preset is given; give --preset "
                               f"{', '.join(PRESETS)} with it")
        return None
    subject = PRESETS[options.preset]
    if getattr(options, "kind", None) not in (None, presets.kind_of(subject)):
        raise ConceptError(f"the kind of concept '{options.name}' is '{options.kind}', and --preset is "
                           f"'{options.preset}'; choose a preset for this kind, or none")
    effort = options.effort or presets.NORMAL
    if is_embedded(options):
        chosen = presets.preset_for_embedded(subject, effort, embedded_name(options))
    else:
        folder = _folder_of(options)
        chosen = presets.preset(subject, effort, presets.family_of_width(folder.context_width))
    return presets.for_other_programs(chosen) if options.for_other_programs else chosen


def training_of(options: Namespace) -> TrainingConfig:
    """Default settings of training on the base, those of the preset if one is given."""
    chosen = preset_of(options)
    if chosen is not None:
        return TrainingConfig(**chosen.training)
    if not is_embedded(options):
        return TrainingConfig()
    return replace(EMBEDDED_TRAINING, resolution=picture_size(embedded_name(options)))


def method_defaults(options: Namespace) -> dict[str, object]:
    """Default settings of the method on the base: learning rates, those of the preset if one is given and its
    method is used, and what other programs need if they are to read the concept."""
    chosen = preset_of(options)
    further = presets.OTHERS_SETTINGS if options.for_other_programs else {}
    if chosen is not None and options.method == chosen.method:
        return {**chosen.rates, **further}
    return {**(EMBEDDED_RATES if is_embedded(options) else {}), **further}


def guidance_of(options: Namespace) -> float:
    """Default guidance scale of the base."""
    return EMBEDDED_CFG if is_embedded(options) else OTHER_CFG


def size_of(options: Namespace) -> int:
    """Default side of the base's pictures in pixels."""
    return picture_size(embedded_name(options)) if is_embedded(options) else OTHER_SIZE


def device_of(options: Namespace) -> torch.device:
    """The device of `--device`. Raises ConceptError if it is not available."""
    try:
        device = torch.device(own_device(options.device))
        torch.zeros(1, device=device).item()      # fails on a device whose tensors hold no numbers
    except (RuntimeError, AssertionError) as error:
        raise ConceptError(f"--device is '{options.device}', which cannot be used here; allowed: "
                           f"{', '.join(_devices())}") from error
    return device


def _devices() -> list[str]:
    """The devices that PyTorch finds here, as `--device` takes them."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["cpu", *(["cuda"] if cards else []), *(f"cuda:{i}" for i in range(cards) if cards > 1),
            *(["mps"] if torch.backends.mps.is_available() else [])]


def check_base(options: Namespace) -> None:
    """Raises ConceptError if the folder of the base or the device cannot be used. Reads no weights."""
    device_of(options)
    if not is_embedded(options):
        _folder_of(options)


def load_backbone(options: Namespace) -> ModuleBackbone:
    """Loads `--base` onto `--device`. Raises ConceptError if the device is not available.

    An embedded base computes with one thread. It is so small that a second thread saves a quarter of the time
    on free cores. On busy cores the threads wait for one another, and a step takes ten times as long or more.
    """
    device = device_of(options)
    if is_embedded(options):
        from ..demo.base import load_base

        torch.set_num_threads(1)
        return load_base(file_of(embedded_name(options)), device)
    from ..hosts.pretrained import load_pretrained

    return load_pretrained(_folder_of(options).path, device)

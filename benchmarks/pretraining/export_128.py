"""Averaged weights of the newest checkpoints of a 128-pixel base into a base file."""

from __future__ import annotations

from pathlib import Path

from ...core.demo import base, networks
from . import progress, sizes, stages


def header(kind: str) -> dict:
    """Sizes of the modules and the schedule, as the file stores them. kind: one of `base.DENOISERS`."""
    shared = {"vae": sizes.AUTOENCODER, "text_encoder": networks.TEXT, "picture_size": sizes.PICTURE}
    if kind == "unet":
        return shared | {"unet": sizes.UNET, "schedule": networks.SCHEDULE}
    config, scale, _ = stages.FLOWS[kind]
    flow = {"kind": "flow", "shift": progress.FLOW_SHIFT, "multiplier": scale}
    return shared | {kind: config, "schedule": flow}


def export(folder: Path, kind: str, target: Path) -> int:
    """Writes the base file `target`; returns the training step that it holds."""
    modules, step = progress.trained_modules(folder, kind)
    base.save_base(modules, target, {"steps": step}, header(kind), packed=True)
    return step

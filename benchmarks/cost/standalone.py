"""ComfyUI without its server, imported from a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ...core.errors import ConceptError


def start(folder: Path) -> None:
    """Makes the modules of a ComfyUI folder importable; call it before any of them is imported.

    Raises:
        ConceptError: if the folder holds no ComfyUI.
    """
    if not (folder / "comfy").is_dir():
        raise ConceptError(f"'{folder}' is not a ComfyUI folder: it has no folder comfy")
    sys.path.insert(0, str(folder))
    from comfy.cli_args import args  # does not read the command line by default

    args.cpu = not torch.cuda.is_available()

"""ComfyUI without its server, imported from a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ...core.errors import ConceptError


def start(folder: Path) -> None:
    """Makes the modules of a ComfyUI folder importable. Call it before importing any of them.

    Raises:
        ConceptError: The folder does not contain ComfyUI.
    """
    if not (folder / "comfy").is_dir():
        raise ConceptError(f"'{folder}' is not a ComfyUI folder: it has no folder comfy")
    sys.path.insert(0, str(folder))
    from comfy.cli_args import args  # ComfyUI ignores the command line here

    args.cpu = not torch.cuda.is_available()

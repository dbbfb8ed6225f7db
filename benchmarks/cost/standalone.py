"""ComfyUI outside its server, for the benchmarks: from a folder, before anything of it is imported."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ...core.errors import ConceptError


def start(folder: Path) -> None:
    """Makes ComfyUI's modules importable, on the processor where there is no graphics card; ConceptError for a folder that is none."""
    if not (folder / "comfy").is_dir():
        raise ConceptError(f"'{folder}' is no ComfyUI: it has no folder comfy")
    sys.path.insert(0, str(folder))
    from comfy.cli_args import args  # reads no command line unless it is told to

    args.cpu = not torch.cuda.is_available()

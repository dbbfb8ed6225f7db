"""A table of pictures as one file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..core.images import to_pil


def save_sheet(pictures: Tensor, path: Path, columns: int = 6) -> None:
    """Writes pictures `[N, 3, H, W]` in -1..1 as a table, N a multiple of `columns`."""
    rows = [torch.cat(list(pictures[i:i + columns]), 2) for i in range(0, len(pictures), columns)]
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(torch.cat(rows, 1)).save(path)

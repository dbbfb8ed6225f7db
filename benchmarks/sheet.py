"""A table of pictures as one file."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def save_sheet(pictures: Tensor, path: Path, columns: int = 6) -> None:
    """Writes pictures `[N, 3, H, W]` in -1..1 as a table, N a multiple of `columns`."""
    rows = [torch.cat(list(pictures[i:i + columns]), 2) for i in range(0, len(pictures), columns)]
    table = ((torch.cat(rows, 1).clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(table.numpy()).save(path)

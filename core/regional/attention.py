"""Region cross-attention: RCA of CIDM (Sec. 3.4), on Mix-of-Show's rules (methods without regions are its special case)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .regions import shares


def region_attention(query: Tensor, base: Tensor, keys: list[Tensor], values: list[Tensor], masks: Tensor, attend,
                     special: Mapping[int, Callable] | None = None) -> Tensor:
    """Cross-attention in which every region reads its own prompt.

    query `[B, S, a]` over a grid flattened row by row; base `[B, S, a]`: the scene prompt's output; keys and values: per region
    `[B, N_u, a]`; masks `[U, S]` in 0..1; attend(query, key, value) -> `[B, S', a]`, plain attention; special: for regions that need
    another, by number, `(query, key, value, cells, share)`: it is told the cells and the region's share of them.

    Where no region is, the scene's output stands; where regions are, their outputs are averaged by count. A region's queries are cut to
    its support, so its cost goes with its area. The paper writes sigma and calls it a sigmoid; it is the softmax of Mix-of-Show.
    """
    region_share, scene_share = shares(masks.to(query.device, torch.float32))
    out = base * scene_share.to(base.dtype).view(1, -1, 1)
    for u, (share, key, value) in enumerate(zip(region_share, keys, values, strict=True)):
        cells = share.nonzero().squeeze(1)
        if cells.numel() == 0:
            continue
        own = (special or {}).get(u)
        inside = attend(query[:, cells], key, value) if own is None else own(query[:, cells], key, value, cells, share[cells])
        out[:, cells] += inside * share[cells].to(base.dtype).view(1, -1, 1)
    return out

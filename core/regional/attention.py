"""Region cross-attention: RCA of CIDM (Sec. 3.4), on Mix-of-Show's rules, with weights of its own for every region.

Every region is attended by a model of its own, the scene's cells by the scene's; only what comes out is mixed, by `Cover`'s weights. A
region's model differs by low-rank deltas, so nothing is computed twice: its keys and values depend on text alone and are made once per
sampling, its query is the frozen one and a low-rank addition, and what its to_out would add is carried along as a few columns. Regions of
like size go through one attention call; the number of operations does not depend on the number of regions.

The paper writes sigma and calls it a sigmoid; it is the softmax of Mix-of-Show. There, too, deltas are those of the whole picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.packed import Stack
from ..model.backbone import AttentionFunction
from .cover import Cover


def taken(x: Tensor, cells: Tensor, regions: int) -> Tensor:
    """`[B, S, c]` at the cells of an Order's group `[G * T]`: `[G, T, c]`."""
    return x.flatten(0, 1).index_select(0, cells).view(regions, -1, x.shape[-1])


def _mixed(results: Sequence[Tensor], cover: Cover, batch: int) -> Tensor:
    """`[B, S, c]` from what the groups gave, `[G, T, c]` each: every cell its own sources, weighted. No cell is written twice, so the sum
    does not depend on an order that a device may choose."""
    flat = [result.reshape(-1, result.shape[-1]) for result in results]
    together = flat[0] if len(flat) == 1 else torch.cat(flat)
    parts = [together.index_select(0, places).unflatten(0, (batch, -1)) for places in cover.order(batch).back]
    if not cover.is_one_each:
        weights = cover.weights_in(together.dtype)
        parts = [part * weights[:, :, m] for m, part in enumerate(parts)]
    return parts[0] if len(parts) == 1 else sum(parts[1:], parts[0])


def _with_scene(mixed: Tensor, base: Tensor | None, cover: Cover) -> Tensor:
    """base: the scene's, None where no cell is the scene's."""
    return mixed if base is None else base * cover.scene.to(base.dtype).unsqueeze(-1) + mixed


def mixed_query(query: Tensor, asked: Tensor, base: Tensor, stacks: Sequence[Stack], cover: Cover) -> Tensor:
    """`[B, S, a]`: every cell's query as its own region asks, mixed; base: the scene's."""
    if not cover.groups:
        return base
    own = [stack.asking(*(taken(x, cells, len(group.members)) for x in (query, asked)))[0]
           for group, stack, cells in zip(cover.groups, stacks, cover.order(len(query)).cells, strict=True)]
    return _with_scene(_mixed(own, cover, len(query)), base, cover)


def attention_within(query: Tensor, key: Tensor, value: Tensor, base: Tensor | None, cover: Cover, heads: int,
                     attend: AttentionFunction) -> Tensor:
    """Self-attention in which no region sees another: query, key, value `[B, S, a]`; base `[B, S, a]`: what the scene's cells get, who see
    everything, None where there are none; attend: plain attention. It costs by the squares of the regions' areas: less than plain where
    they cover the picture."""
    if not cover.groups:
        return base
    results, batch = [], len(query)
    for group, cells in zip(cover.groups, cover.order(batch).cells, strict=True):
        q, k, v = (taken(x, cells, batch * len(group.members)) for x in (query, key, value))      # [G * B, S', a]
        if group.own is None:
            out = attend(q, k, v)
        else:      # fillings are not to be seen
            mask = group.own.repeat_interleave(batch, 0)[:, None, None]
            q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        results.append(out)
    return _with_scene(_mixed(results, cover, batch), base, cover)


def region_attention(query: Tensor, asked: Tensor, base: Tensor | None, stacks: Sequence[Stack], cover: Cover, rows: Tensor, heads: int,
                     attend: AttentionFunction, others: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Cross-attention in which every region reads its own prompt with its own weights.

    query `[B, S, a]`: frozen, over a grid flattened row by row; asked `[B, S, b]`: what to_q read; base `[B, S, a]`: the scene's output,
    None where no cell is the scene's; stacks: one per group of the cover; rows `[B]`, see Stack; attend(query, key, value) ->
    `[B, S', a]`: plain attention; others `[B, S, a]`: what other people's attention adds to it, in the base already. Returns the attended
    values `[B, S, a]`, and what regions add behind to_out `[B, S, a]` (None: nothing).
    """
    if not cover.groups:
        return base, None
    batch, results, behind = len(query), [], []
    for group, stack, cells in zip(cover.groups, stacks, cover.order(batch).cells, strict=True):
        own, read, more = (None if x is None else taken(x, cells, len(group.members)) for x in (query, asked, others))
        out, low = stack.attended(own, read, rows, heads, attend, more)
        results.append(out)
        behind.append(None if low is None else stack.added(low))
    if all(added is None for added in behind):
        return _with_scene(_mixed(results, cover, batch), base, cover), None
    both = [torch.cat([out, torch.zeros_like(out) if added is None else added], -1) for out, added in zip(results, behind, strict=True)]
    mixed, more = _mixed(both, cover, batch).chunk(2, -1)
    return _with_scene(mixed, base, cover), more

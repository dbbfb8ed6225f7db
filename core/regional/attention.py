"""Region cross-attention: RCA of CIDM (Sec. 3.4), by Mix-of-Show's rules, with every region's own weights.

Each region computes attention with its own deltas, and the scene's cells with the scene's deltas. The weights
of `Cover` mix the results. The deltas are low rank, so nothing is computed twice. Keys and values depend on
the text alone and are computed once per sampling. A region's query is the frozen query plus a low-rank term,
and its addition after to_out is kept as a few columns. Regions of similar size share one attention call, so
the number of operations does not depend on the number of regions.

The paper writes sigma and calls it a sigmoid; we use the softmax of Mix-of-Show. Mix-of-Show has one set of
deltas for the whole picture; here every region has its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.packed import PackedKeysValues
from ..model.processor import AttentionFunction
from .cover import Cover


def taken(x: Tensor, cells: Tensor, regions: int) -> Tensor:
    """x `[B, S, c]` at the cells `[G * T]` of an Order's group: `[G, T, c]`."""
    return x.flatten(0, 1).index_select(0, cells).view(regions, -1, x.shape[-1])


def _mixed(results: Sequence[Tensor], cover: Cover, batch: int) -> Tensor:
    """Mixes the groups' results `[G, T, c]` to `[B, S, c]`: each cell is the weighted sum of its sources.
    Each cell is written once, so the result is deterministic on every device.
    """
    flat = [result.reshape(-1, result.shape[-1]) for result in results]
    together = flat[0] if len(flat) == 1 else torch.cat(flat)
    parts = [together.index_select(0, places).unflatten(0, (batch, -1)) for places in cover.order(batch).back]
    if not cover.is_one_each:
        weights = cover.weights_in(together.dtype)
        parts = [part * weights[:, :, m] for m, part in enumerate(parts)]
    return parts[0] if len(parts) == 1 else sum(parts[1:], parts[0])


def _with_scene(mixed: Tensor, base: Tensor | None, cover: Cover) -> Tensor:
    """Adds the scene's share of base `[B, S, a]`; base is None if the scene has no cells."""
    return mixed if base is None else base * cover.scene.to(base.dtype).unsqueeze(-1) + mixed


def mixed_query(query: Tensor, hidden: Tensor, base: Tensor, packed: Sequence[PackedKeysValues],
                cover: Cover) -> Tensor:
    """The query of every cell with the deltas of its regions, mixed by the cover's weights.

    Args:
        query: The frozen query before its norm, `[B, S, a]`.
        hidden: Input of to_q, `[B, S, b]`.
        base: The scene's query, `[B, S, a]`.
        packed: Keys and values, one per group of the cover.
        cover: Cover of the site's grid.

    Returns:
        `[B, S, a]`.
    """
    if not cover.groups:
        return base
    order = cover.order(len(query))
    queries = [group_packed.queries(*(taken(x, cells, len(group.members)) for x in (query, hidden)))[0]
               for group, group_packed, cells in zip(cover.groups, packed, order.cells, strict=True)]
    return _with_scene(_mixed(queries, cover, len(query)), base, cover)


def isolated_attention(query: Tensor, key: Tensor, value: Tensor, cover: Cover, heads: int,
                       attention: AttentionFunction) -> Tensor:
    """Self-attention in which regions do not see each other. The scene's cells see everything.

    The cost is the sum of the squared areas of the regions. This is less than plain self-attention if regions
    cover the picture.

    Args:
        query, key, value: `[B, S, a]`.
        cover: Cover of the site's grid.
        heads: Number of heads of the site.
        attention: Plain attention.

    Returns:
        `[B, S, a]`.
    """
    base = attention(query, key, value) if cover.needs_scene or not cover.groups else None
    if base is not None and not cover.groups:
        return base
    results, batch = [], len(query)
    for group, cells in zip(cover.groups, cover.order(batch).cells, strict=True):
        # [G * B, S', a]
        q, k, v = (taken(x, cells, batch * len(group.members)) for x in (query, key, value))
        if group.own is None:
            out = attention(q, k, v)
        else:      # mask out the padding
            mask = group.own.repeat_interleave(batch, 0)[:, None, None]
            q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        results.append(out)
    return _with_scene(_mixed(results, cover, batch), base, cover)


def region_attention(query: Tensor, hidden: Tensor, base: Tensor | None, packed: Sequence[PackedKeysValues],
                     cover: Cover,
                     rows: Tensor, heads: int, attention: AttentionFunction,
                     others: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Cross-attention in which every region reads its own prompt with its own weights.

    Args:
        query: The frozen query before its norm, over a grid flattened row by row, `[B, S, a]`.
        hidden: Input of to_q, `[B, S, b]`.
        base: The scene's result, `[B, S, a]`; needed if the scene has any cell.
        packed: Keys and values, one per group of the cover.
        cover: Cover of the site's grid.
        rows, heads, attention: As in `PackedKeysValues.attended`.
        others: `[B, S, a]`, output that other nodes' attention adds; already contained in base.

    Returns:
        The attended values `[B, S, a]`, and the regions' addition after to_out `[B, S, a]` (None for none).
    """
    if base is not None and not cover.groups:
        return base, None
    batch, results, behind = len(query), [], []
    for group, group_packed, cells in zip(cover.groups, packed, cover.order(batch).cells, strict=True):
        count = len(group.members)
        own_others = None if others is None else taken(others, cells, count)
        out, low = group_packed.attended(taken(query, cells, count), taken(hidden, cells, count), rows, heads,
                                         attention, own_others)
        results.append(out)
        behind.append(None if low is None else group_packed.added(low))
    if all(added is None for added in behind):
        return _with_scene(_mixed(results, cover, batch), base, cover), None
    both = [torch.cat([out, torch.zeros_like(out) if added is None else added], -1)
            for out, added in zip(results, behind, strict=True)]
    mixed, added = _mixed(both, cover, batch).chunk(2, -1)
    return _with_scene(mixed, base, cover), added

"""Region cross-attention: RCA of CIDM (Sec. 3.4), on Mix-of-Show's rules, with weights of its own for every region.

Every region is attended by a model of its own, the scene's cells by the scene's; only what comes out is mixed, by `Cover`'s weights. A
region's model differs by low-rank deltas, so nothing is computed twice: its keys and values depend on text alone and are made once per
sampling, its query is the frozen one and a low-rank addition, and what its to_out would add is carried along as a few columns. Regions of
like size go through one attention call; the number of operations does not depend on the number of regions.

The paper writes sigma and calls it a sigmoid; it is the softmax of Mix-of-Show. There, too, deltas are those of the whole picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bound import Columns, attend_longer, with_columns
from ..deltas import Delta, LowRankDelta
from .cover import Cover

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Reading:
    """What a region reads at a site, R rows of it (the negative and the positive half of guidance).

    key, value `[R, N, a]`; columns: of its bound concepts; query, out: the region's own deltas of to_q and to_out.
    """

    key: Tensor
    value: Tensor
    columns: Columns = field(default_factory=Columns)
    query: Delta | None = None
    out: Delta | None = None


def _factors(delta: Delta | None) -> tuple[Tensor, Tensor] | None:
    """up `[a, r]` and down `[r, b]`; a sparse delta is its matrix and the identity."""
    if delta is None:
        return None
    if isinstance(delta, LowRankDelta):
        return delta.scale * delta.up, delta.down
    dense = delta.dense()
    return dense, torch.eye(dense.shape[1], device=dense.device)


def _padded(parts: Sequence[Tensor | None], dim: int) -> Tensor | None:
    """Tensors that differ in one dimension, filled up with zeros and stacked; None where all are."""
    known = next((part for part in parts if part is not None), None)
    if known is None:
        return None
    most = max(part.shape[dim] for part in parts if part is not None)
    result = known.new_zeros(len(parts), *(most if d == dim % known.ndim else size for d, size in enumerate(known.shape)))
    for row, part in zip(result, parts, strict=True):
        if part is not None:
            row.narrow(dim, 0, part.shape[dim]).copy_(part)
    return result


class Stack:
    """Readings of one group side by side, G of them; see Reading and Columns. behind `[G, a, p]`: of the columns that come with
    what is attended."""

    def __init__(self, readings: Sequence[Reading]) -> None:
        self.key, self.value = (torch.stack([getattr(one, name) for one in readings]) for name in ("key", "value"))
        columns = [one.columns for one in readings]
        self.asks = _padded([c.asks for c in columns], 0)
        self.key_more, self.value_more = _padded([c.key for c in columns], -1), _padded([c.value for c in columns], -1)
        queries, outs = [_factors(one.query) for one in readings], [_factors(one.out) for one in readings]
        self.query_up, self.query_down = _padded([f and f[0] for f in queries], 1), _padded([f and f[1] for f in queries], 0)
        self.out_down = _padded([f and f[1] for f in outs], 0)
        self._laid: tuple[Tensor, Tensor, Tensor] | None = None      # rows, keys, values
        self._cast: dict[tuple[str, torch.dtype], Tensor] = {}
        behind = [_padded([c.behind for c in columns], 1), _padded([f and f[0] for f in outs], 1)]
        self.behind = torch.cat([part for part in behind if part is not None], -1) if any(part is not None for part in behind) else None

    def asking(self, query: Tensor, asked: Tensor) -> tuple[Tensor, Tensor | None]:
        """The regions' own queries `[B, G, S, a]`, and what makes them longer `[B, G, S, x]`."""
        if self.query_down is not None:
            low = torch.einsum("bgsc,grc->bgsr", asked, self._as("query_down", asked.dtype))
            query = query + torch.einsum("bgsr,gar->bgsa", low, self._as("query_up", asked.dtype))
        return query, None if self.asks is None else torch.einsum("bgsc,grc->bgsr", asked, self._as("asks", asked.dtype))

    def attended(self, query: Tensor, asked: Tensor, rows: Tensor, heads: int, attend: Attend,
                 others: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """query `[B, G, S, a]`: frozen, of the cells of every region; asked `[B, G, S, b]`: what to_q read there; rows `[B]`: the row of
        the readings that each of the batch takes; others `[B, G, S, a]`: what other people's attention adds. Returns the attended values
        `[B, G, S, a]` and what the regions add behind to_out `[B, G, S, a]`."""
        shape = query.shape[:2]
        query, longer = self.asking(query, asked)
        key, value = self._chosen(rows, heads, query.dtype)
        flat, through = query.flatten(0, 1), []
        if self.asks is None and self.value_more is None:
            out = attend(flat, key, value).unflatten(0, shape)
        else:
            out, low = attend_longer(heads, flat, key, value, None if longer is None else longer.flatten(0, 1))
            out = out.unflatten(0, shape)
            through += [] if low is None else [low.unflatten(0, shape)]
        out = out if others is None else out + others
        if self.out_down is not None:
            through.append(torch.einsum("bgsa,gra->bgsr", out, self._as("out_down", out.dtype)))
        if not through:
            return out, None
        low = through[0] if len(through) == 1 else torch.cat(through, -1)
        return out, torch.einsum("bgsp,gap->bgsa", low, self._as("behind", out.dtype))

    def _chosen(self, rows: Tensor, heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of the rows, `[B * G, N, a]`, or of heads with further columns, `[B * G, H, N, d]`: text alone decides, so they
        are laid out once and not in every step."""
        if self._laid is None or self._laid[0] is not rows or self._laid[1].dtype != dtype:
            parts = (self.key, self.key_more), (self.value, self.value_more)
            plain = self.asks is None and self.value_more is None
            both = [known[:, rows].transpose(0, 1).flatten(0, 1).to(dtype)
                    for known in ((x for x, _ in parts) if plain else (with_columns(heads, x, more) for x, more in parts))]
            self._laid = rows, *both
        return self._laid[1], self._laid[2]

    def _as(self, name: str, dtype: torch.dtype) -> Tensor:
        """One of its tensors in the type of the arithmetic, cast once."""
        if (name, dtype) not in self._cast:
            self._cast[name, dtype] = getattr(self, name).to(dtype)
        return self._cast[name, dtype]


def _mixed(results: Sequence[Tensor], cover: Cover, dtype: torch.dtype) -> Tensor:
    """`[B, S, c]` from what the groups gave, `[B, places, c]` each: every cell its own sources, weighted. No cell is written twice, so the
    sum does not depend on an order that a device may choose."""
    together = results[0] if len(results) == 1 else torch.cat(list(results), 1)
    if cover.is_one_each:
        return together[:, cover.sources[:, 0]]
    weights = cover.weights_in(dtype)
    parts = [together[:, cover.sources[:, m]] * weights[:, :, m] for m in range(cover.sources.shape[1])]
    return parts[0] if len(parts) == 1 else sum(parts[1:], parts[0])


def _with_scene(mixed: Tensor, base: Tensor | None, cover: Cover) -> Tensor:
    """base: the scene's, None where no cell is the scene's."""
    return mixed if base is None else base * cover.scene.to(base.dtype).unsqueeze(-1) + mixed


def mixed_query(query: Tensor, asked: Tensor, base: Tensor, stacks: Sequence[Stack], cover: Cover) -> Tensor:
    """`[B, S, a]`: every cell's query as its own region asks, mixed; base: the scene's."""
    own = [stack.asking(query[:, group.cells], asked[:, group.cells])[0].flatten(1, 2)
           for group, stack in zip(cover.groups, stacks, strict=True)]
    return _with_scene(_mixed(own, cover, base.dtype), base, cover) if own else base


def attention_within(query: Tensor, key: Tensor, value: Tensor, base: Tensor | None, cover: Cover, heads: int, attend: Attend) -> Tensor:
    """Self-attention in which no region sees another: query, key, value `[B, S, a]`; base `[B, S, a]`: what the scene's cells get, who see
    everything, None where there are none; attend: plain attention. It costs by the squares of the regions' areas: less than plain where
    they cover the picture."""
    results = []
    for group in cover.groups:
        q, k, v = (x[:, group.cells].flatten(0, 1) for x in (query, key, value))      # [B * G, S', a]
        if group.own is None:
            out = attend(q, k, v)
        else:      # fillings are not to be seen
            mask = group.own.repeat(len(query), 1)[:, None, None]
            q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        results.append(out.unflatten(0, (len(query), -1)).flatten(1, 2))
    return _with_scene(_mixed(results, cover, query.dtype), base, cover) if results else base


def region_attention(query: Tensor, asked: Tensor, base: Tensor | None, stacks: Sequence[Stack], cover: Cover, rows: Tensor, heads: int,
                     attend: Attend, others: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Cross-attention in which every region reads its own prompt with its own weights.

    query `[B, S, a]`: frozen, over a grid flattened row by row; asked `[B, S, b]`: what to_q read; base `[B, S, a]`: the scene's output,
    None where no cell is the scene's; stacks: one per group of the cover; rows `[B]`, see Stack; attend(query, key, value) ->
    `[B, S', a]`: plain attention; others `[B, S, a]`: what other people's attention adds to it, in the base already. Returns the attended
    values `[B, S, a]`, and what regions add behind to_out `[B, S, a]` (None: nothing).
    """
    results, behind = [], []
    for group, stack in zip(cover.groups, stacks, strict=True):
        more = None if others is None else others[:, group.cells]
        out, added = stack.attended(query[:, group.cells], asked[:, group.cells], rows, heads, attend, more)
        results.append(out.flatten(1, 2))
        behind.append(None if added is None else added.flatten(1, 2))
    if not results:
        return base, None
    if all(added is None for added in behind):
        return _with_scene(_mixed(results, cover, query.dtype), base, cover), None
    both = [torch.cat([out, torch.zeros_like(out) if added is None else added], -1) for out, added in zip(results, behind, strict=True)]
    mixed, more = _mixed(both, cover, query.dtype).chunk(2, -1)
    return _with_scene(mixed, base, cover), more

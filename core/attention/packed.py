"""What sites read, laid out for attention once per sampling: text alone decides it, so no step has to do it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.backbone import AttentionFunction
from ..model.deltas import Delta, LowRankDelta
from .token_lora import HeadExtension, attend_longer, with_columns


@dataclass(frozen=True)
class Reading:
    """What a region (or a whole prompt) reads at a site, R rows of it, such as the negative and the positive half of guidance.

    key, value `[R, N, a]`; columns: of its bound concepts; query, out: its own deltas of to_q and to_out.
    """

    key: Tensor
    value: Tensor
    columns: HeadExtension = field(default_factory=HeadExtension)
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
    """Readings of one group side by side, G of them; see Reading and Columns. behind `[G, a, p]`: of the columns that come with what is
    attended. T: the cells of a region in all pictures of a batch, B * S'."""

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
        of_values = self._evened(_padded([c.behind for c in columns], 1))
        behind = [part for part in (of_values, _padded([f and f[0] for f in outs], 1)) if part is not None]
        self.behind = torch.cat(behind, -1) if behind else None

    def _evened(self, behind: Tensor | None) -> Tensor | None:
        """Columns filled up with zeros until keys and values are of one width, a multiple of 8: only so the quick kernels take them."""
        if self.asks is None or self.value_more is None:
            return behind
        heads = self.key_more.shape[-2]
        width = max(self.asks.shape[1], self.value_more.shape[-1])
        width += -(self.key.shape[-1] // heads + width) % 8
        self.asks = F.pad(self.asks, (0, 0, 0, width - self.asks.shape[1]))
        self.key_more, self.value_more, behind = (F.pad(x, (0, width - x.shape[-1])) for x in (self.key_more, self.value_more, behind))
        return behind

    def asking(self, query: Tensor, asked: Tensor) -> tuple[Tensor, Tensor | None]:
        """The regions' own queries `[G, T, a]`, and what makes them longer `[G, T, x]`."""
        if self.query_down is not None:
            low = torch.bmm(asked, self._as("query_down", asked.dtype))
            query = torch.baddbmm(query, low, self._as("query_up", asked.dtype))
        return query, None if self.asks is None else torch.bmm(asked, self._as("asks", asked.dtype))

    def attended(self, query: Tensor, asked: Tensor, rows: Tensor, heads: int, attend: AttentionFunction,
                 others: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """query `[G, T, a]`: frozen, of the cells of every region; asked `[G, T, b]`: what to_q read there; rows `[B]`: the row of the
        readings that each of the batch takes; others `[G, T, a]`: what other people's attention adds. Returns the attended values
        `[G, T, a]`, and columns `[G, T, p]` of which `added` makes what the regions add behind to_out (None: nothing)."""
        query, longer = (None if x is None else x.view(-1, x.shape[1] // len(rows), x.shape[2]) for x in self.asking(query, asked))
        key, value = self._chosen(rows, heads, query.dtype)
        if self.asks is None and self.value_more is None:
            out, low = attend(query, key, value), None
        else:
            out, low = attend_longer(heads, query, key, value, longer)
        out, low = (None if x is None else x.reshape(*asked.shape[:2], -1) for x in (out, low))
        out = out if others is None else out + others
        if self.out_down is not None:
            through = torch.bmm(out, self._as("out_down", out.dtype))
            low = through if low is None else torch.cat([low, through], -1)
        return out, low

    def added(self, low: Tensor, to: Tensor | None = None) -> Tensor:
        """From the columns `[G, T, p]` what the regions add behind to_out `[G, T, a]`; to `[G, T, a]`: what to_out gave, it is changed."""
        return torch.bmm(low, self._as("behind", low.dtype)) if to is None else to.baddbmm_(low.to(to.dtype), self._as("behind", to.dtype))

    def _chosen(self, rows: Tensor, heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of the rows, `[G * B, N, a]`, or of heads with further columns, `[G * B, H, N, d]`: text alone decides, so they
        are laid out once and not in every step."""
        if self._laid is None or self._laid[0] is not rows or self._laid[1].dtype != dtype:
            parts = (self.key, self.key_more), (self.value, self.value_more)
            plain = self.asks is None and self.value_more is None
            both = [known[:, rows].flatten(0, 1).to(dtype)
                    for known in ((x for x, _ in parts) if plain else (with_columns(heads, x, more) for x, more in parts))]
            self._laid = rows, *both
        return self._laid[1], self._laid[2]

    def _as(self, name: str, dtype: torch.dtype) -> Tensor:
        """One of its maps, for vectors in the rows of a matrix, in the type of the arithmetic; cast once."""
        if (name, dtype) not in self._cast:
            self._cast[name, dtype] = getattr(self, name).to(dtype).transpose(1, 2)
        return self._cast[name, dtype]

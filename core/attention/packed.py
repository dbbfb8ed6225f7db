"""Keys and values of several prompts, packed for one attention call. They depend on the text alone, so
packing happens once per sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.deltas import Delta, LowRankDelta
from ..model.processor import AttentionFunction
from ..model.slots import SlotDelta, of_one_length, with_slots
from .token_lora import HeadExtension, extended_attention, extended_heads


@dataclass(frozen=True)
class KeysValues:
    """Keys and values of a region (or a whole prompt) at a site, in R rows, such as the negative and positive
    half of guidance.

    Attributes:
        key, value: `[R, N, a]`.
        extension: Head extension of its word-bound concepts.
        query, out: Deltas of to_q and to_out of this region.
    """

    key: Tensor
    value: Tensor
    extension: HeadExtension = field(default_factory=HeadExtension)
    query: Delta | None = None
    out: Delta | None = None


def _factors(delta: Delta | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Factors up `[a, r]` and down `[r, b]`; for a sparse delta, the dense matrix and the identity."""
    if delta is None:
        return None, None
    if isinstance(delta, LowRankDelta):
        return delta.scale * delta.up, delta.down
    dense = delta.dense()
    return dense, torch.eye(dense.shape[1], device=dense.device)


def _padded(parts: Sequence[Tensor | None], dim: int) -> Tensor | None:
    """Stacks tensors that differ in one dimension, padded with zeros; None if all are None."""
    some = next((part for part in parts if part is not None), None)
    if some is None:
        return None
    longest = max(part.shape[dim] for part in parts if part is not None)
    sizes = (longest if d == dim % some.ndim else size for d, size in enumerate(some.shape))
    result = some.new_zeros(len(parts), *sizes)
    for row, part in zip(result, parts, strict=True):
        if part is not None:
            row.narrow(dim, 0, part.shape[dim]).copy_(part)
    return result


class PackedSlots:
    """Slots of up to C concepts in each of G regions, all of one length m.

    Args:
        key, value: `[C, G, m, a]`; zeros where a region has fewer concepts.
        heads: Number of heads of the site.
    """

    def __init__(self, key: Tensor, value: Tensor, heads: int) -> None:
        self.key, self.value, self.heads, self.count = key, value, heads, len(key)
        self._batch: tuple[int, Tensor, Tensor] | None = None

    @classmethod
    def of(cls, regions: Sequence[Sequence[SlotDelta]]) -> PackedSlots | None:
        """Packs the slots of every region; None if there are none."""
        every = [delta for slots in regions for delta in slots]
        if not every:
            return None
        keys, values = of_one_length(every)
        shape = max(map(len, regions)), len(regions), *keys.shape[1:]
        key, value, place = keys.new_zeros(shape), values.new_zeros(shape), 0
        for region, slots in enumerate(regions):
            for concept in range(len(slots)):
                key[concept, region], value[concept, region] = keys[place], values[place]
                place += 1
        return cls(key, value, every[0].heads)

    def for_rows(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values for `rows` pictures of every region, `[C, G * rows, m, a]`. Cached."""
        if self._batch is None or self._batch[0] != rows or self._batch[1].dtype != dtype:
            key, value = (x.to(dtype).repeat_interleave(rows, 1) for x in (self.key, self.value))
            self._batch = rows, key, value
        return self._batch[1], self._batch[2]


class PackedKeysValues:
    """Stacked keys and values of G regions for one attention call.

    In the shapes below, T counts the cells of a region in all pictures of a batch: T = B * S'.

    Args:
        parts: The regions.
        normalise: The site's norm of queries, `[..., a]` to the same. None if queries are given behind it; no
            part may then have a delta of to_q.
    """

    def __init__(self, parts: Sequence[KeysValues],
                 normalise: Callable[[Tensor], Tensor] | None = None) -> None:
        self._normalise = normalise
        self.key = torch.stack([part.key for part in parts])
        self.value = torch.stack([part.value for part in parts])
        queries, outs = [_factors(part.query) for part in parts], [_factors(part.out) for part in parts]
        self.query_up = _padded([up for up, _ in queries], 1)
        self.query_down = _padded([down for _, down in queries], 0)
        self.out_down = _padded([down for _, down in outs], 0)
        self.extension_down = _padded([part.extension.query_down for part in parts], 0)      # [G, x, b]
        self.extension_key = _padded([part.extension.key for part in parts], -1)             # [G, R, N, H, x]
        values = _padded([part.extension.value for part in parts], -1)                       # [G, R, N, H, p]
        masses = _padded([part.extension.mass for part in parts], -1)                        # [G, R, N, C]
        self.slots = PackedSlots.of([part.extension.slots for part in parts])
        self.extension_value = self._columns(values, masses)                             # [G, R, N, H, p + C]
        self._even()
        self._low_columns = 0 if values is None else values.shape[-1]
        extension_up = _padded([part.extension.out_up for part in parts], 1)
        ups = [up for up in (extension_up, _padded([up for up, _ in outs], 1)) if up is not None]
        self.out_up = torch.cat(ups, -1) if ups else None      # [G, a, p], extensions and deltas of to_out
        self._batch: tuple[Tensor, Tensor, Tensor] | None = None      # rows, and their keys and values
        self._cast: dict[tuple[str, torch.dtype], Tensor] = {}

    def _columns(self, values: Tensor | None, masses: Tensor | None) -> Tensor | None:
        """Extension of the values and masks side by side; None for neither."""
        if masses is None or self.slots is None:
            return values
        masses = masses.unsqueeze(3).expand(-1, -1, -1, self.slots.heads, -1)
        return masses if values is None else torch.cat([values, masses], -1)

    def _even(self) -> None:
        """Pads the extensions until keys and values have the same width, a multiple of 8, which fast
        attention kernels need.
        """
        key, value = self.extension_key, self.extension_value
        if self.extension_down is None or key is None or value is None:
            return
        width = max(self.extension_down.shape[1], value.shape[-1])
        width += -(self.key.shape[-1] // key.shape[-2] + width) % 8
        self.extension_down = F.pad(self.extension_down, (0, 0, 0, width - self.extension_down.shape[1]))
        self.extension_key, self.extension_value = (F.pad(x, (0, width - x.shape[-1])) for x in (key, value))

    def queries(self, query: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries with the regions' deltas.

        Args:
            query: The frozen query before its norm, `[G, T, a]`.
            hidden: Input of to_q, `[G, T, b]`.

        Returns:
            The normalised queries `[G, T, a]`, and their extension `[G, T, x]` or None.
        """
        if self.query_down is not None:
            low = torch.bmm(hidden, self._transposed("query_down", hidden.dtype))
            query = torch.baddbmm(query, low, self._transposed("query_up", hidden.dtype))
        if self._normalise is not None:
            query = self._normalise(query)
        if self.extension_down is None:
            return query, None
        return query, torch.bmm(hidden, self._transposed("extension_down", hidden.dtype))

    def attended(self, query: Tensor, hidden: Tensor, rows: Tensor, heads: int, attention: AttentionFunction,
                 others: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Attention from the cells of each region to the region's text.

        Args:
            query: The frozen query of the cells of every region, as for `queries`, `[G, T, a]`.
            hidden: Input of to_q at these cells, `[G, T, b]`.
            rows: `[B]`, for each picture of the batch its row of the keys and values. Results for the last
                tensor are cached by identity, so do not change it in place.
            heads: Number of heads of the site.
            attention: Plain attention.
            others: `[G, T, a]`, output that other nodes' attention adds.

        Returns:
            The attended values `[G, T, a]`, and low-rank columns `[G, T, p]`, the input of `added`; None if
            the regions add nothing after to_out.
        """
        query, extension = self.queries(query, hidden)
        query = query.view(-1, query.shape[1] // len(rows), query.shape[2])
        key, value = self._keys_values(rows, heads, query.dtype)
        low: Tensor | None = None
        if self.extension_down is None and self.extension_value is None:
            out = attention(query, key, value)
        else:
            extension = None if extension is None else extension.view(len(query), -1, extension.shape[2])
            out, columns = extended_attention(heads, query, key, value, extension)
            if self.slots is not None:
                mass = columns.narrow(-1, self._low_columns, self.slots.count)
                out = with_slots(heads, out, query, mass, *self.slots.for_rows(len(rows), out.dtype))
            if self._low_columns:
                low = columns[..., :self._low_columns].sum(2).reshape(*hidden.shape[:2], -1)
        out = out.reshape(*hidden.shape[:2], -1)
        out = out if others is None else out + others
        if self.out_down is not None:
            through = torch.bmm(out, self._transposed("out_down", out.dtype))
            low = through if low is None else torch.cat([low, through], -1)
        return out, low

    def added(self, low: Tensor, to: Tensor | None = None) -> Tensor:
        """Adds the regions' part after to_out, computed from the columns `[G, T, p]`.

        Args:
            low: The columns from `attended`.
            to: The output of to_out, `[G, T, a]`; the sum is written into it.
        """
        if to is None:
            return torch.bmm(low, self._transposed("out_up", low.dtype))
        return to.baddbmm_(low.to(to.dtype), self._transposed("out_up", to.dtype))

    def _keys_values(self, rows: Tensor, heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of the rows, `[G * B, N, a]`, or as extended heads, `[G * B, H, N, d]`."""
        if self._batch is None or self._batch[0] is not rows or self._batch[1].dtype != dtype:
            key, value = self.key, self.value
            if self.extension_down is not None or self.extension_value is not None:
                key = extended_heads(heads, key, self.extension_key)
                value = extended_heads(heads, value, self.extension_value)
            self._batch = rows, key[:, rows].flatten(0, 1).to(dtype), value[:, rows].flatten(0, 1).to(dtype)
        return self._batch[1], self._batch[2]

    def _transposed(self, name: str, dtype: torch.dtype) -> Tensor:
        """One of the matrices, transposed for row vectors, in the computation's type. The cast is cached."""
        if (name, dtype) not in self._cast:
            self._cast[name, dtype] = getattr(self, name).to(dtype).transpose(1, 2)
        return self._cast[name, dtype]

"""Slots: keys and values of a site's attention that belong to a concept. This is our own form of a delta.

At a site, a concept has m keys k_j and values v_j per head. The attention that a cell x pays to the concept's
words is divided among them:

    out(x) += mass(x) * sum_j softmax_j(q(x) . k_j / sqrt(d)) v_j,      mass(x) = sum_n attention(x, n)

where n runs over the positions of the concept's words. The mass is that of the unchanged softmax over the
text. So slots take no attention from other words, however large their keys grow. Values that start at zero
start from the base.

Slots read only the query. They need no text encoder and no projections, and fit any attention to text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import lcm

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConceptError

SLOTS = "slots"      # stands for a projection in the keys of deltas


@dataclass(frozen=True)
class SlotDelta:
    """The slots of a concept at a site.

    Attributes:
        key, value: `[m, a]`, heads concatenated.
        heads: Number of heads of the site.
        scale: Factor on the values.
    """

    key: Tensor
    value: Tensor
    heads: int
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(m, a)."""
        return self.key.shape[0], self.key.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        """What cells with the query x `[B, S, a]` read from the slots: `[B, S, a]`."""
        read = _read(self.heads, x, *of_one_length([self]))
        return read[:, 0].transpose(1, 2).flatten(2)

    def dense(self) -> Tensor:
        """Raises ConceptError: slots are not a matrix."""
        raise ConceptError("slots cannot be folded into the weights of a model; they act through the "
                           "concept's words")

    def scaled(self, weight: float) -> SlotDelta:
        return SlotDelta(self.key, self.value, self.heads, self.scale * weight)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.key, self.value

    def to(self, device=None, dtype=None) -> SlotDelta:
        return SlotDelta(self.key.to(device, dtype), self.value.to(device, dtype), self.heads, self.scale)


def _read(heads: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What cells read from the slots of C concepts, in one call for all of them.

    The number of concepts does not change the number of operations. Shapes as in `with_slots`.

    Returns:
        `[B, C, H, S, d]`.
    """
    q, k, v = (x.to(query).unflatten(-1, (heads, -1)).transpose(-3, -2) for x in (query, keys, values))
    if k.ndim == 5:      # [C, B, H, m, d]
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    shape = len(q), len(keys), *k.shape[-3:]
    return F.scaled_dot_product_attention(q.unsqueeze(1).expand(-1, len(keys), -1, -1, -1), k.expand(shape),
                                          v.expand(shape))


def of_one_length(slots: Sequence[SlotDelta]) -> tuple[Tensor, Tensor]:
    """Keys and values of several concepts at one site, `[C, m, a]` each, scale included.

    Each is repeated to the least common number of slots, which does not change softmax attention.
    """
    length = reduce(lcm, (delta.shape[0] for delta in slots), 1)
    repeats = [length // delta.shape[0] for delta in slots]
    keys = [delta.key.repeat(times, 1) for delta, times in zip(slots, repeats, strict=True)]
    values = [(delta.scale * delta.value).repeat(times, 1)
              for delta, times in zip(slots, repeats, strict=True)]
    return torch.stack(keys), torch.stack(values)


def with_slots(heads: int, attended: Tensor, query: Tensor, mass: Tensor, keys: Tensor,
               values: Tensor) -> Tensor:
    """Adds to attended values what the cells read from the slots of C concepts.

    Args:
        heads: H.
        attended: `[B, S, a]`.
        query: `[B, S, a]`.
        mass: The attention that each cell pays to each concept's words, `[B, S, H, C]`.
        keys, values: `[C, m, a]`, or for each row, `[C, B, m, a]`.

    Returns:
        `[B, S, a]`.
    """
    read = _read(heads, query, keys, values)
    added = (read * mass.permute(0, 3, 2, 1).unsqueeze(-1)).sum(1)
    return attended + added.transpose(1, 2).flatten(2)

"""A site gone through region by region, where every cell is one region's or the scene's: `attention` without laying out in between.

The cells are put in the regions' order before to_q and back behind to_out, once each; everything in between is done where it lies. Where
no cell is the scene's, its keys and values, which nobody reads, are not made. What it saves is operations rather than arithmetic: on a
graphics card that is quick for its pictures they are what takes time. Nobody else's code may look at the cells in between; the host knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..attention.packed import Stack
from ..model.backbone import AttentionFunction
from .cover import Order

Scene = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


class ByRegion:
    """One site's pass: enter, attend, leave, in this order. order: of a partition, for a batch of B pictures of S cells; members: how many
    regions each of its groups has; stacks: one for each; P: places, B * S where there are no fillings."""

    def __init__(self, order: Order, members: Sequence[int], stacks: Sequence[Stack], batch: int, needs_scene: bool = False) -> None:
        self.stacks, self.batch, self.order, self.reads_text = stacks, batch, order, needs_scene
        self._members = list(members)
        self._asked: list[Tensor] = []
        self._added: list[Tensor | None] = []

    def enter(self, x: Tensor) -> Tensor:
        """`[B, S, b]`, what to_q is to read, as `[1, P, b]`."""
        x = x.flatten(0, 1).index_select(0, self.order.whole).unsqueeze(0)
        self._asked = self._split(x)
        return x

    def attend(self, query: Tensor, rows: Tensor, heads: int, attend: AttentionFunction, scene: Scene | None = None) -> Tensor:
        """query `[1, P, a]`: frozen; rows, attend as in `region_attention`; scene: from the query `[B, S', a]` of its cells and what to_q
        read there, what is attended and what is added behind to_out. Returns the attended values `[1, P, a]`."""
        own, found = self._split(query), []
        self._added = []
        for stack, part, asked in zip(self.stacks, own, self._asked, strict=False):
            out, low = stack.attended(part, asked, rows, heads, attend)
            found.append(out)
            self._added.append(low)
        if self.reads_text:
            out, more = scene(own[-1], self._asked[-1])
            found.append(out)
            self._added.append(more)
        if len(found) == 1:
            return found[0].reshape(query.shape)
        together = query.new_empty(query.shape)
        for place, out in zip(self._split(together), found, strict=True):
            place.copy_(out)
        return together

    def leave(self, y: Tensor) -> Tensor:
        """`[1, P, a]`, what to_out gave, with what the regions add to it, in its places `[B, S, a]`. What to_out gave is changed."""
        for i, (part, added) in enumerate(zip(self._split(y), self._added, strict=True)):
            if added is not None and i < len(self.stacks):
                self.stacks[i].added(added, part)
            elif added is not None:
                part += added.to(part.dtype)
        return y[0].index_select(0, self.order.home).unflatten(0, (self.batch, -1))

    def _split(self, x: Tensor) -> list[Tensor]:
        """`[1, P, c]` into the groups' `[G, T, c]`, and the scene's `[B, S', c]` where there is one."""
        sizes = [len(cells) for cells in self.order.cells]
        rest = x.shape[1] - sum(sizes)
        leads = [*self._members, self.batch] if rest else self._members
        return [part.view(lead, -1, x.shape[-1]) for lead, part in zip(leads, x[0].split([*sizes, rest] if rest else sizes), strict=True)]

"""Region attention with the cells sorted by region, for sites where every cell belongs to one region or to
the scene.

The cells are permuted to order by region before to_q and back after to_out, so that nothing is gathered in
between. If the scene has no cells, its keys and values are not computed. This saves kernel launches rather
than arithmetic, because launches dominate on a fast graphics card. No other node's code may see the permuted
cells, see `SiteCall.enter`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..attention.packed import PackedKeysValues
from ..model.processor import AttentionFunction
from .cover import Order

SceneAttention = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


class PermutedCells:
    """The cells of one site call, ordered by region. P is the number of places: B * S without padding.

    Args:
        order: Order of a partition, for a batch of B pictures of S cells.
        members: Number of regions of each group of the order.
        packed: The keys and values of each group.
        hidden: The original input of to_q, `[B, S, b]`.
    """

    def __init__(self, order: Order, members: Sequence[int], packed: Sequence[PackedKeysValues],
                 hidden: Tensor) -> None:
        self.order, self.packed, self.batch = order, packed, len(hidden)
        self._members = list(members)
        # [1, P, b], the permuted input of to_q
        self.hidden = hidden.flatten(0, 1).index_select(0, order.whole).unsqueeze(0)
        self._added: list[Tensor | None] = []

    def attend(self, query: Tensor, rows: Tensor, heads: int, attention: AttentionFunction,
               scene: SceneAttention | None = None) -> Tensor:
        """Attention of every region, and of the scene.

        Args:
            query: The frozen query before its norm, `[1, P, a]`.
            rows, heads, attention: As in `PackedKeysValues.attended`.
            scene: Attention of the scene's cells. Takes their query, likewise, `[B, S', a]` and their input
                of to_q; returns the attended values and the addition after to_out. None if the scene has no
                cells.

        Returns:
            The attended values, `[1, P, a]`.
        """
        queries, hidden, results = self._split(query), self._split(self.hidden), []
        self._added = []
        for packed, own_query, own_hidden in zip(self.packed, queries, hidden, strict=False):
            out, low = packed.attended(own_query, own_hidden, rows, heads, attention)
            results.append(out)
            self._added.append(low)
        if scene is not None:
            out, added = scene(queries[-1], hidden[-1])
            results.append(out)
            self._added.append(added)
        if len(results) == 1:
            return results[0].reshape(query.shape)
        together = query.new_empty(query.shape)
        for place, out in zip(self._split(together), results, strict=True):
            place.copy_(out)
        return together

    def restore(self, y: Tensor) -> Tensor:
        """Turns the output of to_out, `[1, P, a]`, into the output of the site, `[B, S, a]`. Overwrites its
        input.
        """
        for i, (part, added) in enumerate(zip(self._split(y), self._added, strict=True)):
            if added is not None and i < len(self.packed):
                self.packed[i].added(added, part)
            elif added is not None:
                part += added.to(part.dtype)
        return y[0].index_select(0, self.order.home).unflatten(0, (self.batch, -1))

    def _split(self, x: Tensor) -> list[Tensor]:
        """Splits `[1, P, c]` into `[G, T, c]` per group, and `[B, S', c]` for the scene if it has cells."""
        sizes = [len(cells) for cells in self.order.cells]
        rest = x.shape[1] - sum(sizes)
        leads = [*self._members, self.batch] if rest else self._members
        return [part.view(lead, -1, x.shape[-1])
                for lead, part in zip(leads, x[0].split([*sizes, rest] if rest else sizes), strict=True)]

"""Evaluates regions alone, each as a separate picture, several in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..attention.packed import PackedKeysValues
from ..attention.token_lora import TokenLora, plus, with_delta
from ..model.backbone import Projections
from ..model.processor import AttentionProcessor, HostAttention, SiteCall
from ..model.sites import Site
from .attention import taken
from .cover import Order
from .permuted import PermutedCells
from .processor import Part, keys_values_of


class CropProcessor(AttentionProcessor):
    """Each of K regions reads its own prompt with its own deltas. The scene's prompt is not used.

    For each half of guidance (negative, positive), a batch holds K * B crops of one size, ordered by region.

    Args:
        backbone: Provides the frozen projections.
        scene: Its deltas act on the scene's keys and values, which other nodes may read.
        parts: The regions.
    """

    def __init__(self, backbone: Projections, scene: Part, parts: Sequence[Part]) -> None:
        self.keys_values, self._backbone = keys_values_of(backbone, parts), backbone
        self.count = len(parts)
        self.scene_concepts: TokenLora | None = None      # word-bound concepts of the scene's prompt
        self._scene_deltas = scene.deltas
        self._packed: dict[int, PackedKeysValues] = {}
        self._orders: dict[tuple, Order] = {}
        self._rows: dict[tuple, Tensor] = {}
        self._batch: tuple[tuple[int, ...], int] = ((), 0)      # halves, total rows

    def take(self, halves: Sequence[int], rows: int) -> None:
        """Announces the next batch.

        Args:
            halves: Half of guidance of each chunk of the batch: 0 negative, 1 positive.
            rows: Total rows of the batch.
        """
        self._batch = tuple(halves), rows

    def _order(self, cells: int, device: torch.device) -> Order:
        """Permutes the cells of the batch to order by region, and back."""
        key = (*self._batch, cells, str(device))
        if key not in self._orders:
            halves, rows = self._batch
            places = torch.arange(rows * cells, device=device).view(len(halves), self.count, -1)
            places = places.transpose(0, 1).flatten()
            home = torch.empty_like(places)
            home[places] = torch.arange(len(places), device=device)
            self._orders[key] = Order((places,), (home,), places, home)
            pictures = rows // (len(halves) * self.count)
            self._rows[key] = torch.tensor(halves, device=device).repeat_interleave(pictures)
        return self._orders[key]

    def _rows_of(self, cells: int, device: torch.device) -> Tensor:
        """`[K * B]` or `[2 * K * B]`: the half of guidance of each row, see `PackedKeysValues.attended`."""
        key = (*self._batch, cells, str(device))
        return self._rows[key]

    def _packed_at(self, site: Site) -> PackedKeysValues:
        if site.index not in self._packed:
            self._packed[site.index] = PackedKeysValues(self.keys_values[site.index],
                                                        partial(self._backbone.normalised, site, "to_q"))
        return self._packed[site.index]

    def enter(self, call: SiteCall) -> None:
        x = call.hidden
        order, packed = self._order(x.shape[1], x.device), [self._packed_at(call.site)]
        cells = PermutedCells(order, [self.count], packed, x)
        rows, heads = self._rows_of(x.shape[1], x.device), call.site.heads

        def attend(query: Tensor, _key: Tensor, _value: Tensor, attention: HostAttention) -> Tensor:
            return cells.attend(query, rows, heads, attention)

        call.reorder(cells.hidden, attend, cells.restore)
        call.reads_text = False

    def project(self, site: Site, projection: str, x: Tensor, y: Tensor) -> Tensor:
        if projection not in ("to_k", "to_v"):
            return y
        y = with_delta(self._scene_deltas, site, projection, x, y)
        return y if self.scene_concepts is None else self.scene_concepts.project(site, projection, x, y)

    def attend(self, call: SiteCall, query: Tensor, key: Tensor, value: Tensor,
               attention: HostAttention) -> Tensor:
        site, packed = call.site, self._packed_at(call.site)
        order = self._order(query.shape[1], query.device)
        own, hidden = (taken(x, order.whole, self.count) for x in (call.before_norm(query), call.hidden))
        rows, others = self._rows_of(query.shape[1], query.device), None
        if attention.replaced is not None:
            asking = self._back(packed.queries(own, hidden)[0], order, query)
            added = attention.added_by_others(asking, key, value)
            others = None if added is None else taken(added, order.whole, self.count)
        out, low = packed.attended(own, hidden, rows, site.heads, attention.plain, others)
        if low is not None:
            call.after_out = partial(plus, self._back(packed.added(low), order, query))
        return self._back(out, order, query)

    @staticmethod
    def _back(x: Tensor, order: Order, like: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1]).index_select(0, order.home).view(like.shape)

"""The regions whose cost is measured, the same for every host."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.regional.processor import Part
from ...core.regional.regions import Region
from ..cost.synthetic import context_of, deltas_of

Box = tuple[float, float, float, float]      # top, left, bottom, right


def boxes_of(count: int) -> list[Box]:
    """Side by side, over the whole picture."""
    return [(0.0, i / count, 1.0, (i + 1) / count) for i in range(count)]


def parts_of(layout, boxes: Sequence[Box], is_bound: bool) -> tuple[list[Region], list[Part], dict]:
    """Regions with a concept of its own each, on q, k, v and out and with layer-wise words; and the concepts that are bound."""
    names = [f"concept{i}" for i in range(len(boxes))]
    known = {name: deltas_of(layout, seed=i) for i, name in enumerate(names)}
    parts = [Part(context_of(2, layout.copies, seed=10 + i, words={name: (3, 4)} if is_bound else None), {} if is_bound else known[name],
                  {name: known[name]} if is_bound else {}) for i, name in enumerate(names)]
    return [Region(name, box=box) for name, box in zip(names, boxes, strict=True)], parts, known if is_bound else {}

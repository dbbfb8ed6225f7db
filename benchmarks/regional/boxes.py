"""What is measured of the cost of regions, the same in every host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...core.model.deltas import Deltas
from ...core.model.sites import SiteLayout
from ...core.regional.processor import Part
from ...core.regional.regions import Box, Region
from ..cost.synthetic import context_of, deltas_of

Measurement = dict[str, Any]      # "seconds" of every step but the first; "peak_gb", None where it is unknown


def boxes_of(count: int) -> list[Box]:
    """Side by side, over the whole picture."""
    return [(0.0, i / count, 1.0, (i + 1) / count) for i in range(count)]


def parts_of(layout: SiteLayout, boxes: Sequence[Box],
             is_word_bound: bool) -> tuple[list[Region], list[Part], dict[str, Deltas]]:
    """Regions with one concept each, on q, k, v and out and with layer-wise words; and the word-bound
    concepts."""
    names = [f"concept{i}" for i in range(len(boxes))]
    deltas = {name: deltas_of(layout, seed=i) for i, name in enumerate(names)}
    parts = []
    for i, name in enumerate(names):
        context = context_of(2, layout.copies, seed=10 + i, words={name: (3, 4)} if is_word_bound else None)
        own = deltas[name]
        parts.append(Part(context, {}, {name: own}) if is_word_bound else Part(context, own))
    regions = [Region(name, box=box) for name, box in zip(names, boxes, strict=True)]
    return regions, parts, deltas if is_word_bound else {}

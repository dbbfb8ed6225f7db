"""Boxes, regions and measurements for the cost benchmark, the same in every host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...core.model.deltas import Deltas
from ...core.model.sites import SiteLayout
from ...core.regional.processor import Part
from ...core.regional.regions import Box, Region
from ..cost.synthetic import context_of, deltas_of

Measurement = dict[str, Any]      # "seconds" of every step except the first; "peak_gb", None if unknown


QUARTERS: list[Box] = [(i / 2, j / 2, (i + 1) / 2, (j + 1) / 2) for i in range(2) for j in range(2)]


def boxes_of(count: int) -> list[Box]:
    """Columns that cover the whole picture."""
    return [(0.0, i / count, 1.0, (i + 1) / count) for i in range(count)]


def parts_of(layout: SiteLayout, boxes: Sequence[Box],
             is_word_bound: bool) -> tuple[list[Region], list[Part], dict[str, Deltas]]:
    """Regions with one concept each (deltas of q, k, v and out, layer-wise words), and the word-bound
    concepts.
    """
    names = [f"concept{i}" for i in range(len(boxes))]
    deltas = {name: deltas_of(layout, seed=i) for i, name in enumerate(names)}
    parts = []
    for i, name in enumerate(names):
        context = context_of(2, layout.copies, seed=10 + i, words={name: (3, 4)} if is_word_bound else None)
        concept_deltas = deltas[name]
        parts.append(Part(context, {}, {name: concept_deltas}) if is_word_bound
                     else Part(context, concept_deltas))
    regions = [Region(name, box=box) for name, box in zip(names, boxes, strict=True)]
    return regions, parts, deltas if is_word_bound else {}

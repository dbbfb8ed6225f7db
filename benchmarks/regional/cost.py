"""Cost of regions: seconds per step and peak memory against a plain picture, on SD1.5's shape with random
weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from ...core.model.backbone import Backbone
from ...core.model.context import Context
from ...core.model.processor import AttentionProcessor
from ...core.regional.processor import Part, RegionProcessor
from ...core.regional.regions import Box
from ..cost.synthetic import Operations, context_of, peak_gb, sd15_backbone
from .boxes import Measurement, boxes_of, parts_of

COUNTS = (2, 4, 8)
LAYOUTS: dict[str, list[Box]] = {      # for these, operations alone are counted
    "free cells": [(0.25, 0.125, 0.75, 0.375), (0.25, 0.625, 0.75, 0.875)],
    "overlap": [(0.0, 0.0, 1.0, 0.75), (0.0, 0.25, 1.0, 1.0)],
}
HOOKS = (2, 4)      # one evaluation for each region: eight take too long


class Cost(Protocol):
    """A host with a model; every method samples a few steps and gives a Measurement.

    With a counter the second step is counted: the first one prepares, and the last one of a picture may do
    more.
    """

    counter: Operations | None

    def plain(self) -> Measurement: ...

    def regions(self, boxes: Sequence[Box], is_word_bound: bool = True) -> Measurement: ...


@runtime_checkable
class HostCost(Cost, Protocol):
    """A host with more than a UNet: prompts of word-bound concepts, and regions in its own way."""

    def prompt(self, count: int) -> Measurement: ...

    def hooks(self, count: int) -> Measurement: ...


class DiffusersCost:
    """A UNet alone, evaluated as a step with guidance evaluates it. backbone: one of the wanted shape."""

    def __init__(self, backbone: Backbone, pixels: int, steps: int) -> None:
        self.backbone, self.side, self.steps = backbone, pixels // 8, steps
        self.counter: Operations | None = None

    def _stepped(self, context: Context, processor: AttentionProcessor | None = None) -> Measurement:
        shape = (2, self.backbone.latent_channels, self.side, self.side)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        seconds: list[float] = []

        def steps() -> None:
            for i in range(self.steps if self.counter is None else 2):
                began = time.perf_counter()
                with self.counter if i and self.counter is not None else nullcontext():
                    self.backbone.predict(x, torch.tensor([900 - i] * 2), context, processor)
                seconds.append(time.perf_counter() - began)

        return {"peak_gb": peak_gb(steps), "seconds": seconds[1:]}

    def plain(self) -> Measurement:
        return self._stepped(context_of(2, 1, seed=1))

    def regions(self, boxes: Sequence[Box], is_word_bound: bool = True) -> Measurement:
        regions, parts, _ = parts_of(self.backbone.layout, boxes, is_word_bound)
        scene, rows = Part(context_of(2, 1, seed=1), {}), torch.tensor([0, 1])
        processor = RegionProcessor(self.backbone, scene, regions, parts, rows, (self.side, self.side))
        return self._stepped(scene.context, processor)


def comfyui_cost(folder: Path, pixels: int, steps: int) -> Cost:
    """In the ComfyUI of a folder."""
    from ..cost import standalone

    standalone.start(folder)
    from .comfy_cost import ComfyCost

    return ComfyCost(pixels, steps)


def diffusers_cost(pixels: int, steps: int) -> Cost:
    """Without ComfyUI: a UNet of SD1.5's shape."""
    return DiffusersCost(sd15_backbone(), pixels, steps)


def measure(cost: Cost, rounds: int, tell: Callable[[str], object]) -> dict:
    """Measures every way right after a plain picture, `rounds` times, and takes the median of the ratios.

    The speed of a machine changes from minute to minute, but it is about the same for both of a pair.
    """
    ways: dict[str, Callable[[], Measurement]] = {"routed 4": partial(cost.regions, boxes_of(4), False)}
    ways |= {f"regions {count}": partial(cost.regions, boxes_of(count)) for count in COUNTS}
    hooks: dict[str, Callable[[], Measurement]] = {}
    if isinstance(cost, HostCost):
        ways["prompt 2"] = partial(cost.prompt, 2)
        hooks = {f"hooks {count}": partial(cost.hooks, count) for count in HOOKS}
    pairs: dict[str, list[tuple[Measurement, Measurement]]] = {name: [] for name in (*ways, *hooks)}
    with torch.inference_mode():
        counts = {name: _counted(cost, way) for name, way in {"plain": cost.plain, **ways}.items()}
        layouts = {name: _counted(cost, partial(cost.regions, boxes)) for name, boxes in LAYOUTS.items()}
        for i in range(rounds):
            for name, way in ((ways | hooks) if i == 0 else ways).items():      # hooks: once is enough
                pairs[name].append((cost.plain(), way()))
                plain, own = (min(measured["seconds"]) for measured in pairs[name][-1])
                tell(f"round {i + 1}, {name}: {own:.2f} s per step, plain {plain:.2f} s")
    rows = _rows(pairs, counts)
    rows["layouts"] = {name: {"operations": count, "operations_over_plain": count / counts["plain"]}
                       for name, count in layouts.items()}
    return rows


def _counted(cost: Cost, way: Callable[[], Measurement]) -> int:
    """Operations of a step. On a graphics card each is one kernel launch or more; the machine's speed does
    not matter."""
    cost.counter = counter = Operations()
    try:
        way()
        return counter.count
    finally:
        cost.counter = None


def _rows(pairs: Mapping[str, list[tuple[Measurement, Measurement]]], counts: Mapping[str, int]) -> dict:
    plain = [measured for measurements in pairs.values() for measured, _ in measurements]
    rows: dict = {"plain": _row(plain) | {"operations": counts["plain"]}}
    for name, measurements in pairs.items():
        kind, _, count = name.partition(" ")
        row = _row([own for _, own in measurements])
        ratios = [min(own["seconds"]) / min(base["seconds"]) for base, own in measurements]
        row["over_plain"] = statistics.median(ratios)
        are_known = None not in (row["peak_gb"], rows["plain"]["peak_gb"])
        row["peak_over_plain"] = row["peak_gb"] / rows["plain"]["peak_gb"] if are_known else None
        if name in counts:
            row |= {"operations": counts[name], "operations_over_plain": counts[name] / counts["plain"]}
        rows.setdefault(kind, {})[count] = row
    return rows


def _row(measurements: Sequence[Measurement]) -> dict:
    """The smallest of the times, and of the peaks that are known."""
    peaks = [measured["peak_gb"] for measured in measurements if measured["peak_gb"] is not None]
    seconds = [second for measured in measurements for second in measured["seconds"]]
    return {"step_seconds": min(seconds), "peak_gb": min(peaks) if peaks else None}

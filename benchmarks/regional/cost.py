"""Cost of regions: seconds per step and peak memory relative to a plain picture, on SD1.5's shape with random
weights.
"""

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
LAYOUTS: dict[str, list[Box]] = {      # only operations are counted for these
    "free cells": [(0.25, 0.125, 0.75, 0.375), (0.25, 0.625, 0.75, 0.875)],
    "overlap": [(0.0, 0.0, 1.0, 0.75), (0.0, 0.25, 1.0, 1.0)],
}
HOOKS = (2, 4)      # one evaluation per region: eight would take too long


class Cost(Protocol):
    """A host with a model. Every method samples a few steps and returns a Measurement.

    A counter counts the second step, because the first one includes preparation and the last one may do more.
    """

    counter: Operations | None

    def plain(self) -> Measurement: ...

    def regions(self, boxes: Sequence[Box], is_word_bound: bool = True) -> Measurement: ...


@runtime_checkable
class HostCost(Cost, Protocol):
    """A host that also supports prompts with word-bound concepts, its own kind of regions, and steps with
    crop denoising or isolation."""

    def regions(self, boxes: Sequence[Box], is_word_bound: bool = True, crops: bool = False,
                isolated: bool = False) -> Measurement: ...

    def prompt(self, count: int) -> Measurement: ...

    def hooks(self, count: int) -> Measurement: ...


class DiffusersCost:
    """A UNet alone, evaluated like a step with guidance. backbone: a backbone of the required shape."""

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


def comfyui_cost(folder: Path, pixels: int, steps: int) -> HostCost:
    """The host in the ComfyUI of a folder."""
    from ..cost import standalone

    standalone.start(folder)
    from .comfy_cost import ComfyCost

    return ComfyCost(pixels, steps)


def diffusers_cost(pixels: int, steps: int) -> Cost:
    """The host without ComfyUI: a UNet of SD1.5's shape."""
    return DiffusersCost(sd15_backbone(), pixels, steps)


def measure(cost: Cost, rounds: int, tell: Callable[[str], object]) -> dict:
    """Measures every way directly after a plain picture, `rounds` times, and takes the median of the ratios.

    The speed of a machine changes from minute to minute, but is nearly equal for both measurements of a pair.
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
                plain, with_regions = (min(measured["seconds"]) for measured in pairs[name][-1])
                tell(f"round {i + 1}, {name}: {with_regions:.2f} s per step, plain {plain:.2f} s")
    rows = _rows(pairs, counts)
    rows["layouts"] = {name: {"operations": count, "operations_over_plain": count / counts["plain"]}
                       for name, count in layouts.items()}
    return rows


def _counted(cost: Cost, way: Callable[[], Measurement]) -> int:
    """Number of operations of a step. It does not depend on the machine's speed. On a graphics card each is
    at least one kernel launch.
    """
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
        row = _row([measured for _, measured in measurements])
        ratios = [min(measured["seconds"]) / min(base["seconds"]) for base, measured in measurements]
        row["over_plain"] = statistics.median(ratios)
        are_known = None not in (row["peak_gb"], rows["plain"]["peak_gb"])
        row["peak_over_plain"] = row["peak_gb"] / rows["plain"]["peak_gb"] if are_known else None
        if name in counts:
            row |= {"operations": counts[name], "operations_over_plain": counts[name] / counts["plain"]}
        rows.setdefault(kind, {})[count] = row
    return rows


def _row(measurements: Sequence[Measurement]) -> dict:
    """The smallest time, and the smallest known peak."""
    peaks = [measured["peak_gb"] for measured in measurements if measured["peak_gb"] is not None]
    seconds = [second for measured in measurements for second in measured["seconds"]]
    return {"step_seconds": min(seconds), "peak_gb": min(peaks) if peaks else None}

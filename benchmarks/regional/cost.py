"""`bench regional`, cost: seconds per step and peak memory with regions against a plain picture, on SD1.5's shape with random weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

import torch

from ...core.model.backbone import Backbone
from ...core.model.context import Context
from ...core.regional.processor import Part, RegionProcessor
from ..cost.synthetic import Operations, context_of, peak_gb, sd15_backbone
from .boxes import Box, boxes_of, parts_of

COUNTS = (2, 4, 8)
LAYOUTS = {"free cells": [(0.25, 0.125, 0.75, 0.375), (0.25, 0.625, 0.75, 0.875)],      # of which operations alone are counted
           "overlap": [(0.0, 0.0, 1.0, 0.75), (0.0, 0.25, 1.0, 1.0)]}
HOOKS = (2, 4)      # one evaluation for each: eight take too long


class Cost(Protocol):
    """A host with a model; each way gives `{"seconds": of every step but the first, "peak_gb"}`. With a counter, the second step
    is counted: the first one prepares, and a picture's last step may keep more."""

    counter: Operations | None

    def plain(self) -> dict: ...

    def regions(self, boxes: Sequence[Box], is_bound: bool = True) -> dict: ...


class DiffusersCost:
    """A UNet alone, evaluated as a step with guidance evaluates it. `backbone`: with a UNet of the wanted shape."""

    def __init__(self, backbone: Backbone, pixels: int, steps: int) -> None:
        self.backbone, self.side, self.steps, self.counter = backbone, pixels // 8, steps, None

    def _stepped(self, context: Context, processor=None) -> dict:
        x = torch.randn(2, self.backbone.latent_channels, self.side, self.side, generator=torch.Generator().manual_seed(1))
        seen = []

        def steps() -> None:
            for i in range(self.steps if self.counter is None else 2):
                began = time.perf_counter()
                with self.counter if i and self.counter is not None else nullcontext():
                    self.backbone.predict(x, torch.tensor([900 - i] * 2), context, processor)
                seen.append(time.perf_counter() - began)

        return {"peak_gb": peak_gb(steps), "seconds": seen[1:]}

    def plain(self) -> dict:
        return self._stepped(context_of(2, 1, seed=1))

    def regions(self, boxes: Sequence[Box], is_bound: bool = True) -> dict:
        regions, parts, _ = parts_of(self.backbone.layout, boxes, is_bound)
        scene = Part(context_of(2, 1, seed=1), {})
        processor = RegionProcessor(self.backbone, scene, regions, parts, torch.tensor([0, 1]), (self.side, self.side))
        return self._stepped(scene.context, processor)


def comfyui_cost(folder: Path, pixels: int, steps: int) -> Cost:
    """In the ComfyUI of a folder."""
    from ..cost import standalone

    standalone.start(folder)
    from .comfy_cost import ComfyCost

    return ComfyCost(pixels, steps)


def diffusers_cost(pixels: int, steps: int) -> Cost:
    """Without ComfyUI: the UNet alone, of SD1.5's shape."""
    return DiffusersCost(sd15_backbone(), pixels, steps)


def measure(cost: Cost, rounds: int, tell: Callable[[str], object]) -> dict:
    """Every way right after a plain look, `rounds` times, and the median of what it takes over that: a machine's pace drifts from minute to
    minute, and drifts for both."""
    ways = {"routed 4": lambda: cost.regions(boxes_of(4), is_bound=False)}
    ways |= {f"regions {n}": lambda n=n: cost.regions(boxes_of(n)) for n in COUNTS}
    ways |= {"prompt 2": lambda: cost.prompt(2)} if hasattr(cost, "prompt") else {}
    hooks = {f"hooks {n}": lambda n=n: cost.hooks(n) for n in HOOKS} if hasattr(cost, "hooks") else {}
    found: dict[str, list[tuple[dict, dict]]] = {name: [] for name in (*ways, *hooks)}
    with torch.inference_mode():
        counts = {name: _counted(cost, way) for name, way in {"plain": cost.plain, **ways}.items()}
        layouts = {name: _counted(cost, lambda boxes=boxes: cost.regions(boxes)) for name, boxes in LAYOUTS.items()}
        for i in range(rounds):
            for name, way in ((ways | hooks) if i == 0 else ways).items():      # hooks are far enough off for one look
                found[name].append((cost.plain(), way()))
                plain, own = (min(look["seconds"]) for look in found[name][-1])
                tell(f"round {i + 1}, {name}: {own:.2f} s per step, plain {plain:.2f} s")
    told = _told(found, counts)
    told["layouts"] = {name: {"operations": count, "operations_over_plain": count / counts["plain"]} for name, count in layouts.items()}
    return told


def _counted(cost: Cost, way: Callable[[], dict]) -> int:
    """Operations of a step: on a graphics card as many kernel launches or more. A figure that no machine's pace disturbs."""
    cost.counter = Operations()
    try:
        way()
        return cost.counter.count
    finally:
        cost.counter = None


def _told(found: dict[str, list[tuple[dict, dict]]], counts: dict[str, int]) -> dict:
    plain = [look for pairs in found.values() for look, _ in pairs]
    rows: dict = {"plain": _row(plain) | {"operations": counts["plain"]}}
    for name, pairs in found.items():
        kind, _, count = name.partition(" ")
        row = _row([own for _, own in pairs])
        row["over_plain"] = statistics.median(min(own["seconds"]) / min(base["seconds"]) for base, own in pairs)
        both = None not in (row["peak_gb"], rows["plain"]["peak_gb"])
        row["peak_over_plain"] = row["peak_gb"] / rows["plain"]["peak_gb"] if both else None
        if name in counts:
            row |= {"operations": counts[name], "operations_over_plain": counts[name] / counts["plain"]}
        rows.setdefault(kind, {})[count] = row
    return rows


def _row(looks: list[dict]) -> dict:
    """The least of the times, and of the peaks where the system tells them."""
    peaks = [look["peak_gb"] for look in looks if look["peak_gb"] is not None]
    return {"step_seconds": min(second for look in looks for second in look["seconds"]), "peak_gb": min(peaks) if peaks else None}

"""Cost of whole pictures with regions. A picture's steps are of up to three kinds: steps with crop denoising,
then steps with self-attention isolation, then steps with region attention alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .boxes import QUARTERS, Measurement, boxes_of
from .cost import HostCost

LAYOUTS = {"2 columns": boxes_of(2), "4 quarters": QUARTERS, "4 columns": boxes_of(4),
           "8 columns": boxes_of(8)}
KINDS: dict[str, dict[str, bool]] = {      # kind of step -> how the host is asked for it
    "crop denoising": {"crops": True}, "isolation": {"isolated": True}, "region attention": {},
}


@dataclass(frozen=True)
class Shares:
    """Settings of a picture: shares of its first steps with crop denoising and with isolation."""

    crop_denoising: float
    isolation: float

    def __str__(self) -> str:
        return f"{self.crop_denoising:g} / {self.isolation:g}"

    def mean(self, costs: Mapping[str, float]) -> float:
        """The mean cost of a picture's step. costs: cost of each kind of step."""
        isolated = max(0.0, self.isolation - self.crop_denoising)      # crops need none: they are apart
        rest = 1 - self.crop_denoising - isolated
        return (self.crop_denoising * costs["crop denoising"] + isolated * costs["isolation"]
                + rest * costs["region attention"])


SETTINGS = (Shares(0.7, 1), Shares(0.4, 0))      # those of the quality's table, and the node's defaults


def measure(host: HostCost, rounds: int, tell: Callable[[str], object]) -> dict:
    """Measures each kind of step in each layout directly after a plain picture, and takes the median of the
    ratios over the rounds.

    Returns:
        "steps": layout -> kind of step -> cost relative to a plain step; "pictures": layout -> settings ->
        cost relative to a plain picture.
    """
    def ratio(layout: str, kind: str) -> float:
        plain = host.plain()
        way = host.regions(LAYOUTS[layout], **KINDS[kind])
        found = _seconds(way) / _seconds(plain)
        tell(f"{layout}, {kind}: {_seconds(way):.2f} s per step, {found:.2f} of plain")
        return found

    with torch.inference_mode():
        ratios = [{(layout, kind): ratio(layout, kind) for layout in LAYOUTS for kind in KINDS}
                  for _ in range(rounds)]
    steps = {layout: {kind: statistics.median(found[layout, kind] for found in ratios) for kind in KINDS}
             for layout in LAYOUTS}
    pictures = {layout: {str(shares): shares.mean(costs) for shares in SETTINGS}
                for layout, costs in steps.items()}
    return {"steps": steps, "pictures": pictures}


def _seconds(measured: Measurement) -> float:
    return min(measured["seconds"])

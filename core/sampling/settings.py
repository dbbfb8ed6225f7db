"""Sampling settings, shared by sampling of prompts, of drawn regions and of found regions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import ConceptError
from ..model.solver import no_report
from ..regional.noise import NoiseSettings
from ..regional.regions import OVERLAPS


@dataclass(frozen=True)
class SampleSettings:
    """How pictures are sampled.

    Args:
        steps: Steps of DPM-Solver++ (2M), or of Euler's method for a base of flow matching.
        cfg: Guidance scale; 1 = no guidance.
        size: Height and width of the picture in pixels.
        negative: Negative prompt.
        mode, strength: How deltas are combined, see `conditioning.routing.aggregate`.
        noise: Region noise estimation and crop denoising.
        overlap: Which region gets the cells where regions overlap, see `regional.regions.shares`.
        isolation: Self-attention isolation: share of the first steps in which regions do not see each other
            in self-attention.
        batch: Pictures per batch.
        artists: Strength of attention guidance for prompts that name two concepts or more; 0 = off. It does
            nothing with regions.
        on_step: Called after each step of each batch; it does not change the pictures.
    """

    steps: int = 25
    cfg: float = 7.5
    size: tuple[int, int] = (512, 512)
    negative: str = ""
    mode: str = "sharp"
    strength: float = 1.0
    noise: NoiseSettings = NoiseSettings()
    overlap: str = "average"
    isolation: float = 0.0
    batch: int = 16
    artists: float = 0.0
    on_step: Callable[[], object] = field(default=no_report, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.cfg < 0:
            raise ConceptError(f"steps and cfg are {self.steps} and {self.cfg}; "
                               "allowed: steps 1 or more, cfg 0 or more")
        if self.batch < 1 or self.overlap not in OVERLAPS:
            raise ConceptError(f"batch and overlap are {self.batch} and {self.overlap!r}; "
                               f"allowed: 1 or more, {', '.join(OVERLAPS)}")
        if not 0 <= self.isolation <= 1:
            raise ConceptError(f"isolation is {self.isolation}; allowed: 0 to 1, a share of the steps")
        if not 0 <= self.artists < float("inf"):
            raise ConceptError(f"artists, the strength of attention guidance, is {self.artists}; "
                               "allowed: 0 or more")

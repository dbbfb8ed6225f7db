"""Chooses how much faster than objects a method learns styles.

The tuning suite has two styles. That is too few: with the rates that it chose for low-rank concepts, two of
eight random styles are not learned at all. So after all other settings, every method learns further styles
one after another with its chosen rates, and with these rates times `FACTORS`. The factor with the largest
*alone* at the end is chosen, averaged over both judges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from .runs import STYLE_RATE, Run
from .sequence_run import finished_run
from .tables import ALONE, overall_share

FACTORS = (1.0, 4.0)


def folder_of(folder: Path) -> Path:
    """The folder of the trials of styles, inside that of all other trials."""
    return folder / "styles"


def trials_of(chosen: Mapping[str, float | int]) -> list[dict[str, float | int]]:
    """The settings of the trials of a method whose other settings are chosen."""
    return [{**chosen, STYLE_RATE: factor} if factor != 1.0 else dict(chosen) for factor in FACTORS]


def results(runs: Sequence[Run], trials: Sequence[Mapping], folder: Path, levels: Mapping,
            known: Mapping[str, Mapping]) -> list[dict]:
    """The figures of the finished runs, in the order of the trials. A failed run has no *alone*,
    and neither has one whose pictures hold NaN.

    Args:
        runs, trials: One for each other.
        folder: Folder of the trials.
        levels: Floor and ceiling of the further styles.
        known: Name of a run -> its entry in an earlier result.
    """
    found = []
    for run, settings in zip(runs, trials, strict=True):
        stored = finished_run(folder_of(folder) / f"{run.name}.json")
        if stored is None:
            found += [dict(known[run.name])] if run.name in known else []
            continue
        entry = {"settings": settings, "seed": run.seed}
        if "failed" in stored:
            found.append({**entry, "failed": stored["failed"]})
            continue
        shares = [overall_share(stored, levels, ALONE, judge) for judge in stored["judges"]]
        alone = sum(shares) / len(shares)
        found.append({**entry, ALONE: alone} if math.isfinite(alone) else entry)
    return found


def best(found: Sequence[Mapping]) -> Mapping | None:
    """The settings of the best trial; None until all are finished. Of equal ones, the smaller factor."""
    if len(found) < len(FACTORS):
        return None
    return max(found, key=lambda each: each.get(ALONE, float("-inf")))["settings"]

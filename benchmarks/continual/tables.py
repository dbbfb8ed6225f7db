"""The figures of a method's runs as tables, one row per run and one column per concept.

Scores become shares of the way from the floor (class nouns of the base, 0) to the ceiling (real pictures, 1),
per concept. Such a share can be below 0 or above 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .judges import ENCODER

ALONE, COMBINED, PAIRS, CONFUSED = "alone", "combined", "pairs", "confused"
FORGOTTEN, LOST = "forgotten", "lost"      # after learning minus at the end: of the share, of the cosine
HIGHER_IS_BETTER = {ALONE: True, COMBINED: True, PAIRS: True, CONFUSED: False, FORGOTTEN: False,
                    LOST: False}


@dataclass(frozen=True)
class Table:
    """values: `[runs, columns]`; runs: (order, seed) of each row; columns: concepts, or pairs `a+b`."""

    values: np.ndarray
    runs: tuple[tuple[int, int], ...]
    columns: tuple[str, ...]

    def only(self, runs: Sequence[tuple[int, int]] | None = None,
             columns: Sequence[str] | None = None) -> Table:
        """The rows and columns that are named, in that order."""
        runs = self.runs if runs is None else tuple(runs)
        columns = self.columns if columns is None else tuple(columns)
        rows, places = [self.runs.index(run) for run in runs], [self.columns.index(c) for c in columns]
        return Table(self.values[np.ix_(rows, places)], runs, columns)


def share(score: float, floor: float, ceiling: float) -> float:
    """The way from floor to ceiling that a score has gone. Not a number if there is no way."""
    return (score - floor) / (ceiling - floor) if ceiling > floor else float("nan")


@dataclass(frozen=True)
class Way:
    """gained: what scores are above the floor; whole: what the ceiling is above the floor; both summed."""

    gained: float = 0.0
    whole: float = 0.0

    def __add__(self, other: Way) -> Way:
        return Way(self.gained + other.gained, self.whole + other.whole)

    @property
    def share(self) -> float:
        """The share of the way that was gained. Not a number if there is no way."""
        return share(self.gained, 0.0, self.whole)


def _key(group: Sequence[str]) -> str:
    return "+".join(group)


def _single(figures: Mapping, levels: Mapping, judge: str, names: Sequence[str], what: str) -> dict[str, Way]:
    """Concept -> way of its score in `figures[what]`, for the learned concepts `names`."""
    floor, ceiling = (levels[row]["judges"][judge]["alone"] for row in ("floor", "ceiling"))
    places = [levels["concepts"].index(name) for name in names]
    return {name: Way(score - floor[place], ceiling[place] - floor[place])
            for name, place, score in zip(names, places, figures[what], strict=True)}


def _several(figures: Mapping, levels: Mapping, judge: str, what: str) -> dict[str, Way]:
    """Concept -> its way in the groups (or pairs) that name it and have a ceiling.

    Scores are summed over the groups before they become a share: where floor and ceiling are close, a group's
    own share is mostly noise.
    """
    floors, ceilings = ({_key(group["concepts"]): group["alignment"] for group in
                         levels[row]["judges"][judge][what]} for row in ("floor", "ceiling"))
    ways: dict[str, Way] = {}
    for group in figures[what]:
        key = _key(group["concepts"])
        if key in floors and key in ceilings:
            for name, score, floor, ceiling in zip(group["concepts"], group["alignment"], floors[key],
                                                   ceilings[key], strict=True):
                ways[name] = ways.get(name, Way()) + Way(score - floor, ceiling - floor)
    return ways


def _ways(run: Mapping, levels: Mapping, figure: str, judge: str) -> dict[str, Way]:
    figures = run["judges"][judge]
    if figure == ALONE:
        return _single(figures, levels, judge, run["concepts"], "alone")
    return _several(figures, levels, judge, {COMBINED: "groups", PAIRS: "pairs"}[figure])


def overall_share(run: Mapping, levels: Mapping, figure: str, judge: str = ENCODER) -> float:
    """The share of the way that all concepts together have gained: of ALONE, COMBINED or PAIRS."""
    return sum(_ways(run, levels, figure, judge).values(), Way()).share


def columns_of(run: Mapping, levels: Mapping, figure: str, judge: str = ENCODER) -> dict[str, float]:
    """Column -> value of one figure of a run; empty where the run or the levels do not have it."""
    figures, names = run["judges"][judge], run["concepts"]
    if figure == CONFUSED:
        return {_key(pair["concepts"]): pair["confused"] for pair in figures["pairs"]}
    if figure == FORGOTTEN:
        just, end = (_single(figures, levels, judge, names, what) for what in ("just", "alone"))
        return {name: just[name].share - end[name].share for name in names}
    if figure == LOST:
        return {name: figures["just"][i] - figures["alone"][i] for i, name in enumerate(names)}
    return {name: way.share for name, way in _ways(run, levels, figure, judge).items()}


def table_of(runs: Sequence[Mapping], levels: Mapping, figure: str, judge: str = ENCODER) -> Table | None:
    """A figure of a method's runs; None if the runs do not have it."""
    ordered = sorted(runs, key=lambda run: (run["order"], run["seed"]))
    rows = [columns_of(run, levels, figure, judge) for run in ordered]
    columns = tuple(sorted(set.intersection(*({name for name, value in row.items() if np.isfinite(value)}
                                              for row in rows))))
    if not columns:
        return None
    values = np.array([[row[column] for column in columns] for row in rows])
    return Table(values, tuple((run["order"], run["seed"]) for run in ordered), columns)


def common(left: Table, right: Table) -> tuple[Table, Table]:
    """The rows and columns that both tables have."""
    runs = [run for run in left.runs if run in right.runs]
    columns = [column for column in left.columns if column in right.columns]
    return left.only(runs, columns), right.only(runs, columns)


def spreads(table: Table) -> dict[str, float | None]:
    """Standard deviations of a run's mean: over seeds at one order, and over orders at one seed.

    The order with most seeds and the seed with most orders are taken; None where these are single ones.
    """
    means = dict(zip(table.runs, table.values.mean(1), strict=True))
    found: dict[str, float | None] = {}
    for name, fixed in (("seeds", 0), ("orders", 1)):
        groups: dict[int, list[float]] = {}
        for run, value in means.items():
            groups.setdefault(run[fixed], []).append(value)
        most = max(groups.values(), key=len)
        found[name] = float(np.std(most, ddof=1)) if len(most) > 1 else None
    return found

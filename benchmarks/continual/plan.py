"""Which runs the benchmark performs if none are asked for."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.methods import METHODS
from .runs import Run

# The word-bound methods and those that they are compared with by name. Others have fewer runs.
PUBLISHED = ("lora", "tara", "tova", "cidm", "cns", "l2dm", "clora", "finetune")
NAMED = ("slots", "bound", *PUBLISHED)
SEEDS, ORDERS = (21, 22, 23, 24, 25), (21, 22, 23)      # none of them was used to choose a setting
# (order, seed): five seeds in one order, and two further orders at one seed
MANY = (*((ORDERS[0], seed) for seed in SEEDS), *((order, SEEDS[0]) for order in ORDERS[1:]))
FEW = ((ORDERS[0], SEEDS[0]), (ORDERS[0], SEEDS[1]), (ORDERS[1], SEEDS[0]))


def planned(rows: Sequence[tuple[str, str]], tasks: int) -> list[Run]:
    """The default plan: seven runs of the methods in `NAMED`, three of all others.

    Runs that all methods have come first, so that an unfinished benchmark compares like with like.

    Args:
        rows: Method and overrides of each row of the table.
        tasks: Number of tasks.
    """
    wanted = [(place, Run(method, tasks, order, seed, overrides=overrides))
              for method, overrides in rows
              for place, (order, seed) in enumerate(_places(method))]
    return [run for _, run in sorted(wanted, key=lambda pair: pair[0])]


def _places(method: str) -> tuple[tuple[int, int], ...]:
    if method not in NAMED:
        return FEW
    return (*FEW, *(place for place in MANY if place not in FEW))


def all_methods() -> list[tuple[str, str]]:
    """Every method as a row without overrides; the named ones first."""
    first = [name for name in NAMED if name in METHODS]
    return [(name, "") for name in (*first, *sorted(set(METHODS) - set(first)))]

"""Looks at a concept while it is learned: a figure for how good it is by now, and whether that still grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..bank.bank import ConceptBank

Judge = Callable[[ConceptBank, int], float]      # a bank with the concept as it is after so many steps -> how good it is, more is better


def has_stalled(scores: Sequence[float], patience: int) -> bool:
    """Whether the last `patience` looks brought nothing better than those before them; never for 0."""
    return 0 < patience < len(scores) and max(scores[-patience:]) <= max(scores[:-patience])

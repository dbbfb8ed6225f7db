"""Early stopping: a concept is evaluated while it is learned, and learning ends when the score plateaus."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..bank.bank import ConceptBank

# (bank with the concept as learned so far, step) -> score, higher is better
Evaluator = Callable[[ConceptBank, int], float]


def has_stalled(scores: Sequence[float], patience: int) -> bool:
    """Whether none of the last `patience` scores exceeds all earlier ones. NaN, the score of a picture that
    holds NaN, exceeds none. Never true for a patience of 0."""
    known = [-math.inf if math.isnan(score) else score for score in scores]
    return 0 < patience < len(known) and max(known[-patience:]) <= max(known[:-patience])

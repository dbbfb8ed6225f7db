"""Several concepts in one picture without regions: measures how well each is shown and which are confused.

The picture is cut into one vertical strip per concept in the prompt. Every strip is scored for every concept,
and strips are optimally assigned to concepts. This measure is our own, because the
papers show such pictures without figures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Combined:
    """Results for pictures that name K concepts.

    Attributes:
        alignment: Score of each concept's strip for the concept, `[B, K]`.
        confused: Whether that strip scores higher for another concept of the prompt, `[B, K]` bool.
        bleed: Score of each concept's strip for every concept of the prompt, `[B, asked, shown]`.
    """

    alignment: Tensor
    confused: Tensor
    bleed: Tensor


def strip(pictures: Tensor, index: int, count: int) -> Tensor:
    """Keeps one of `count` vertical strips of `[B, 3, H, W]` in place.

    Its border columns are repeated over the rest.
    """
    width = pictures.shape[-1]
    left, right = round(index * width / count), round((index + 1) * width / count)
    return F.pad(pictures[..., left:right], (left, width - right, 0, 0), mode="replicate")


def strip_scores(pictures: Tensor, count: int, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Scores every strip for every concept.

    Args:
        pictures: `[B, 3, H, W]`.
        count: Number K of strips and concepts.
        score: Pictures -> scores `[B, K]`.

    Returns:
        `[B, strips, K]`.
    """
    return torch.stack([score(strip(pictures, i, count)) for i in range(count)], dim=1)


def assign_strips(scores: Tensor) -> Combined:
    """Assigns strips to concepts with the largest sum of scores. scores: `[B, K, K]`, strip by concept."""
    count = scores.shape[-1]
    # assignments[i, c] = the strip of concept c
    assignments = torch.tensor(list(permutations(range(count))))
    concepts = torch.arange(count)
    best = assignments[scores[:, assignments, concepts].sum(-1).argmax(1)]
    strips = scores[torch.arange(len(scores)).unsqueeze(1), best]      # [B, K, K]: asked by shown
    return Combined(strips.diagonal(dim1=1, dim2=2), strips.argmax(-1) != concepts, strips)

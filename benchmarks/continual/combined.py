"""Several concepts in one picture without regions: measures which concepts are present and which are
confused.

The picture is cut into one vertical strip per concept in the prompt. Every strip is compared with real
pictures of every concept, and strips are optimally assigned to concepts. This measure is our own, because the
papers show such pictures without figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Combined:
    """Results for pictures that name K concepts, each `[B, K]`.

    Attributes:
        alignment: Alignment of each concept's strip with the concept, float.
        confused: Whether that strip is more similar to another concept of the prompt, bool.
        present: Whether the concept is present: not confused, and its alignment above its level, bool.
    """

    alignment: Tensor
    confused: Tensor
    present: Tensor


def strip(pictures: Tensor, index: int, count: int) -> Tensor:
    """Keeps one of `count` vertical strips of `[B, 3, H, W]` in place.

    Its border columns are repeated over the rest.
    """
    width = pictures.shape[-1]
    left, right = round(index * width / count), round((index + 1) * width / count)
    return F.pad(pictures[..., left:right], (left, width - right, 0, 0), mode="replicate")


def similarities(pictures: Tensor, references: Sequence[Tensor],
                 features: Callable[[Tensor], Tensor]) -> Tensor:
    """Compares each of K strips with each of K concepts.

    Args:
        pictures: `[B, 3, H, W]`.
        references: Per concept, unit features of real pictures `[N, D]`.
        features: Pictures -> unit features `[B, D]`.

    Returns:
        Mean cosines `[B, strips, K]`.
    """
    count = len(references)
    strips = [features(strip(pictures, i, count)) for i in range(count)]
    return torch.stack([torch.stack([(seen @ real.T).mean(1) for real in references], dim=1)
                        for seen in strips], dim=1)


def assign_strips(scores: Tensor, levels: Sequence[float]) -> Combined:
    """Assigns strips to concepts with the largest sum of scores.

    Args:
        scores: `[B, K, K]`, strip by concept.
        levels: Per concept, the score that its strip must exceed to count as that individual.
    """
    count = scores.shape[-1]
    # assignments[i, c] = the strip of concept c
    assignments = torch.tensor(list(permutations(range(count))))
    concepts = torch.arange(count)
    best = assignments[scores[:, assignments, concepts].sum(-1).argmax(1)]
    # [B, K]: the strip of concept c, compared with c
    alignment = scores.gather(1, best.unsqueeze(1)).squeeze(1)
    strips = scores[torch.arange(len(scores)).unsqueeze(1), best]
    confused = strips.argmax(-1) != concepts
    return Combined(alignment, confused, ~confused & (alignment > torch.tensor(levels).to(alignment)))

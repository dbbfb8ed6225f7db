"""Several concepts in one picture without regions: who is there, and who is mistaken for whom.

The picture is cut into as many upright strips as the prompt names concepts; every strip is compared with every named concept's real
pictures, and strips are given to concepts in the way that fits best. Ours: the papers only show such pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Together:
    """Of pictures that name K concepts, all `[B, K]`: alignment of every concept's strip with it; whether that strip is nearer to another
    of the named concepts; whether the concept is there (not mistaken, and nearer to its real pictures than its level)."""

    alignment: Tensor
    mistaken: Tensor
    present: Tensor


def strip(pictures: Tensor, index: int, count: int) -> Tensor:
    """One of `count` upright strips alone, its borders drawn out over the rest: the encoder sees one object where it is. `[B, 3, H, W]`."""
    width = pictures.shape[-1]
    left, right = round(index * width / count), round((index + 1) * width / count)
    return F.pad(pictures[..., left:right], (left, width - right, 0, 0), mode="replicate")


def similarities(pictures: Tensor, references: Sequence[Tensor], features) -> Tensor:
    """`[B, strips, K]`: mean cosine of every strip with every concept's reference features `[N, D]`, as many strips as concepts."""
    count = len(references)
    seen = [features(strip(pictures, i, count)) for i in range(count)]
    return torch.stack([torch.stack([(one @ own.T).mean(1) for own in references], dim=1) for one in seen], dim=1)


def together(scores: Tensor, levels: Sequence[float]) -> Together:
    """scores `[B, K, K]` of strips and concepts; levels: what a concept's strip must exceed to count as that individual."""
    count = scores.shape[-1]
    ways = torch.tensor(list(permutations(range(count))))      # way[c] = the strip of concept c
    concepts = torch.arange(count)
    best = ways[scores[:, ways, concepts].sum(-1).argmax(1)]
    own = scores.gather(1, best.unsqueeze(1)).squeeze(1)       # [B, K]: the strip that concept c has, compared with c
    strips = scores[torch.arange(len(scores)).unsqueeze(1), best]
    mistaken = strips.argmax(-1) != concepts
    return Together(own, mistaken, ~mistaken & (own > torch.tensor(levels).to(own)))

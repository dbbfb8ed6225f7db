"""Aggregation: per site, one weight per concept, from the prompt. Pure functions on tensors.

Three readings of elastic weight aggregation (CIDM, Eq. 3):
- `sharp`, ours and the default: a concept that the prompt names has weight 1, others 0. Strength does not fade as the bank grows.
- `paper`: relation = max over prompt positions of the dot product with the concept's mean token state; squared, L2-normalised.
- `released`: cosines per concept word, max over prompt positions, mean over words; 4th power, L1-normalised; deltas scaled by 0.8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

RELEASED_SCALE = 0.8


def sharp_weights(names: Sequence[str], named: Sequence[str], sites: int) -> Tensor:
    """`[sites, g]`: 1 for named concepts, 0 for others."""
    wanted = set(named)
    row = torch.tensor([1.0 if name in wanted else 0.0 for name in names])
    return row.expand(sites, len(names)).clone()


def equal_weights(count: int, sites: int) -> Tensor:
    """`[sites, g]`: 1 / g each (LoRA-M, equal merge)."""
    return torch.full((sites, count), 1.0 / max(1, count))


def paper_weights(prompt: Tensor, concepts: Tensor) -> Tensor:
    """psi(M) = M^2 / ||M^2||, M_i = max over positions of c e_i.

    prompt: states of the inference prompt `[..., n, d]`; concepts: mean state of each concept's words `[..., g, d]`; returns `[..., g]`.
    Weights can sum to more than 1: the norm is L2.
    """
    relation = (prompt @ concepts.transpose(-1, -2)).amax(-2)
    squared = relation.square()
    return squared / squared.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def released_weights(prompt: Tensor, words: Tensor, counts: Sequence[int]) -> Tensor:
    """As the released code does: words `[..., sum(counts), d]` are the states of all concept words in one prompt, begin token left out.

    prompt `[..., n, d]`; returns `[..., g]`, summing to 1.
    """
    cosine = F.normalize(prompt, dim=-1) @ F.normalize(words, dim=-1).transpose(-1, -2)
    per_word = cosine.amax(-2)
    relation = torch.stack([part.mean(-1) for part in per_word.split(list(counts), dim=-1)], dim=-1)
    fourth = relation.pow(4)
    return fourth / fourth.abs().sum(-1, keepdim=True).clamp(min=1e-12)

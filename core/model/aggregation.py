"""Aggregation weights: one weight per site and concept, computed from the prompt. Pure functions on tensors.

Elastic weight aggregation (CIDM, Eq. 3) comes in three forms:
- `sharp`, ours and the default: a concept that the prompt names has weight 1, others 0. A concept keeps its
  strength as the bank grows.
- `paper`: the relation is the maximum over prompt positions of the dot product with the concept's mean token
  state; the weights are the squared relations, L2-normalised.
- `released`, as in the released code: the relation is the mean over the concept's words of the maximum over
  prompt positions of the cosine; the weights are its 4th power, L1-normalised, and deltas are scaled by 0.8.
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
    """psi(M) = M^2 / ||M^2||, with M_i the maximum over positions of c e_i (CIDM, Eq. 3). Because the norm is
    L2, weights can sum to more than 1.

    Args:
        prompt: States of the inference prompt, `[..., n, d]`.
        concepts: Mean state of each concept's words, `[..., g, d]`.

    Returns:
        The weights, `[..., g]`.
    """
    relation = (prompt @ concepts.transpose(-1, -2)).amax(-2)
    squared = relation.square()
    return squared / squared.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def released_weights(prompt: Tensor, words: Tensor, counts: Sequence[int]) -> Tensor:
    """The weights of CIDM's released code.

    Args:
        prompt: States of the inference prompt, `[..., n, d]`.
        words: States of all concepts' words, encoded in one prompt, without the begin token:
            `[..., sum(counts), d]`.
        counts: Number of words of each of the g concepts.

    Returns:
        The weights, `[..., g]`; they sum to 1.
    """
    cosine = F.normalize(prompt, dim=-1) @ F.normalize(words, dim=-1).transpose(-1, -2)
    per_word = cosine.amax(-2)
    relation = torch.stack([part.mean(-1) for part in per_word.split(list(counts), dim=-1)], dim=-1)
    fourth = relation.pow(4)
    return fourth / fourth.abs().sum(-1, keepdim=True).clamp(min=1e-12)

"""A training batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One training batch.

    latents: `[B, C, h, w]`, clean; prompts: B texts with placeholders; masks: `[B, 1, h, w]` in 0..1, the
    part that counts; is_prior: `[B]` bool, True for prior-preservation pictures; weights: `[B]`, the loss
    weight of each sample.
    """

    latents: Tensor
    prompts: tuple[str, ...]
    masks: Tensor
    is_prior: Tensor
    weights: Tensor

"""A training batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One training batch.

    latents: `[B, C, h, w]`, clean; prompts: B texts with placeholders; masks: `[B, 1, h, w]` in 0..1, weights
    of the loss; is_prior: `[B]` bool, True for prior-preservation pictures; weights: `[B]`, the loss weight
    of each sample.
    """

    latents: Tensor
    prompts: tuple[str, ...]
    masks: Tensor
    is_prior: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Tensor) -> Batch:
        """The samples with the given indices `[n]`, on any device."""
        def pick(tensor: Tensor) -> Tensor:
            return tensor[index.to(tensor.device)]

        prompts = tuple(self.prompts[i] for i in index.tolist())
        return Batch(pick(self.latents), prompts, pick(self.masks), pick(self.is_prior), pick(self.weights))

    def joined(self, other: Batch) -> Batch:
        """Concatenates this batch and another one, which is converted to this one's devices and types."""
        def join(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.cat([mine, theirs.to(mine)])

        return Batch(join(self.latents, other.latents), self.prompts + other.prompts,
                     join(self.masks, other.masks), join(self.is_prior, other.is_prior),
                     join(self.weights, other.weights))

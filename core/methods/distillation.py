"""Replay of old requests, on which the model before the task is the teacher. LwF and L2DM share this."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from ..data.batch import Batch
from ..model.backbone import Backbone
from .base import Forward


class Teacher:
    """The model before this task: the base with the earlier concepts folded in, where training starts.

    It is a forward pass without the adapters and needs no copy. extended: the last batch with replayed rows;
    start, end: where its distilled rows are.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.start, self.end = backbone, 0, 0
        self.extended: Batch | None = None

    def extend(self, batch: Batch, replayed: Batch, count: int | None = None) -> Batch:
        """Appends rows. The weights of the others grow, so that the mean over all rows counts them as before.

        count: how many of the replayed rows, from the first, are distilled; None = all.
        """
        self.start, share = len(batch), (len(batch) + len(replayed)) / len(batch)
        self.end = self.start + (len(replayed) if count is None else count)
        self.extended = replace(batch, weights=batch.weights * share).joined(replayed)
        return self.extended

    def distillation(self, seen: Forward, elasticity: float = 0.0) -> Tensor | None:
        """Mean squared difference between the outputs of this model and of the teacher, over replayed rows.

        The teacher has the precision of the pass. None if the pass has no such rows.

        Args:
            seen: the pass.
            elasticity: a row's weight is its own difference to this power, relative to the mean of all rows;
                0 = every row counts alike.
        """
        if seen.batch is not self.extended:
            return None
        rows, kind = slice(self.start, self.end), self.backbone.device.type
        with torch.no_grad(), torch.autocast(kind, seen.precision) if seen.precision else nullcontext():
            taught = self.backbone.predict(seen.noisy[rows], seen.timesteps[rows], seen.context[rows])
        squares = (seen.output[rows].float() - taught.float()).square()
        if elasticity == 0:
            return squares.mean()
        distances = squares.flatten(1).mean(1)
        weights = distances.detach() ** elasticity
        return (distances * weights).mean() / weights.mean().clamp(min=1e-20)

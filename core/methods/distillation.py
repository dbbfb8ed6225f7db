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
    start: its first one.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.start = backbone, 0
        self.extended: Batch | None = None

    def extend(self, batch: Batch, replayed: Batch) -> Batch:
        """Appends rows. The weights of the others grow, so that the mean over all rows counts them as before.
        """
        self.start, share = len(batch), (len(batch) + len(replayed)) / len(batch)
        self.extended = replace(batch, weights=batch.weights * share).joined(replayed)
        return self.extended

    def distillation(self, seen: Forward) -> Tensor | None:
        """Mean squared difference between the outputs of this model and of the teacher, over replayed rows.

        The teacher has the precision of the pass. None if the pass has no such rows.
        """
        if seen.batch is not self.extended:
            return None
        rows, kind = slice(self.start, None), self.backbone.device.type
        with torch.no_grad(), torch.autocast(kind, seen.precision) if seen.precision else nullcontext():
            taught = self.backbone.predict(seen.noisy[rows], seen.timesteps[rows], seen.context[rows])
        return (seen.output[rows].float() - taught.float()).square().mean()

"""Distillation of the old model, which LwF and L2DM share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.backbone import Backbone
from .base import Forward


def distillation(backbone: Backbone, seen: Forward, start: int) -> Tensor:
    """Mean squared difference between the outputs of this model and of the old one, over rows from `start`.

    The old model is the base with the earlier concepts folded in, where training starts. It is a forward pass
    without the adapters and needs no copy.
    """
    rows = slice(start, None)
    with torch.no_grad():
        taught = backbone.predict(seen.noisy[rows], seen.timesteps[rows], seen.context[rows])
    return (seen.output[rows].float() - taught.float()).square().mean()

"""Marks in a CONDITIONING that say which prompts of the regions belong to it: the positive or the negative
ones.

The host numbers the conditionings of a call, but the numbers mean different things in KSampler, in guiders
with three conditionings and in nodes that predict a single one. Marks mean the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.conds

MARKS = "continual_concepts_marks"      # keyword of the UNet call, key in transformer_options

Conditioning = list[list[Any]]      # ComfyUI's CONDITIONING: pairs of a tensor and a dictionary
# half of guidance (0 negative, 1 positive), and the area of the frame that the host evaluates (height, width,
# top, left); None = all of it
Mark = tuple[int, "tuple[int, ...] | None"]


class PromptMark(comfy.conds.CONDRegular):
    """The mark of one conditioning; a UNet call gets a tuple of them, one per conditioning of its batch."""

    def process_cond(self, batch_size, area=None, **kwargs):
        return PromptMark((self.cond[0], None if area is None else tuple(area)))

    def can_concat(self, other) -> bool:
        return isinstance(other, PromptMark) and self.cond[1] == other.cond[1]      # one area per call

    def concat(self, others) -> tuple[Mark, ...]:
        return tuple(mark.cond for mark in (self, *others))

    def size(self) -> list[int]:
        return [1]


def marked(conditioning: Conditioning, half: int) -> Conditioning:
    """Returns a CONDITIONING whose prompts are marked as negative (0) or positive (1)."""
    mark = {MARKS: PromptMark((half, None))}
    return [[hidden, {**extra, "model_conds": {**extra.get("model_conds", {}), **mark}}]
            for hidden, extra in conditioning]


def is_marked(conds: Sequence[dict]) -> bool:
    """Whether all conditionings of the host's list are marked. An empty list is not."""
    return bool(conds) and all(MARKS in cond.get("model_conds", {}) for cond in conds)

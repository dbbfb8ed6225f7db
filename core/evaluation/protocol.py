"""What evaluations have in common: the interface of a metric encoder, and the words of a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..data.assignment import Assignment
from ..methods.base import METHODS


class Encoder(Protocol):
    """Interface of a metric encoder. All features have unit length; pictures are `[B, 3, H, W]` in -1..1.

    reads_texts: whether `caption_features` can be used.
    """

    reads_texts: bool

    def features(self, images: Tensor, kind: str) -> Tensor:
        """Features `[B, D]` for comparing pictures of one kind (object or style)."""
        ...

    def image_text_features(self, images: Tensor) -> Tensor:
        """Features `[B, D]` of pictures for comparing with texts."""
        ...

    def caption_features(self, captions: Sequence[str]) -> Tensor:
        """Features `[B, D]` of texts in the space of `image_text_features`."""
        ...


def words_for(method: str, task: Assignment) -> tuple[str, ...]:
    """The task's words, or none for methods with another number of words."""
    return task.words if METHODS[method].method.words_of_kind(task.kind) == len(task.words) else ()

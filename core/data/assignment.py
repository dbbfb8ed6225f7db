"""A task of a sequence whose results are measured."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .photos import Picture


@dataclass(frozen=True)
class Assignment:
    """One task of a sequence: training pictures, and what to measure with.

    references: training pictures `[N, 3, H, W]` in -1..1; held_out: real pictures not trained on; prompts: with the placeholder;
    noun_prompts: the same wishes in the base's words, before anything was learned; words: names of the learned words, empty = the method's.
    """

    name: str
    class_noun: str
    kind: str
    pictures: tuple[Picture, ...]
    references: Tensor
    held_out: Tensor
    prompts: tuple[str, ...]
    noun_prompts: tuple[str, ...]
    words: tuple[str, ...] = ()

"""A task of a sequence whose results are measured."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .photos import Picture


@dataclass(frozen=True)
class Assignment:
    """One task of a sequence: what to learn from, and what to measure with.

    pictures: to learn from; references: the same as `[N, 3, H, W]` in -1..1; held_out: real pictures `[M, 3,
    H, W]` that are not learned from; prompts: with the placeholder; noun_prompts: the same prompts with the
    class noun, for the base model; words: names of the learned words, empty = the method's.
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

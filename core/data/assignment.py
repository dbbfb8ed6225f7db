"""A task of a sequence, with pictures and prompts for its evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .pictures import Picture


@dataclass(frozen=True)
class Assignment:
    """One task of a sequence: training pictures, and pictures and prompts for evaluation.

    pictures: training pictures; references: the same as `[N, 3, H, W]` in -1..1; held_out: real pictures `[M,
    3, H, W]` not used for training; prompts: with the placeholder; noun_prompts: the same prompts with the
    class noun, for the base model; words: names of the learned words, empty = the method's default.
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

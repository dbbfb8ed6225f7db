"""Textual inversion (Gal et al., ICLR 2023, arXiv 2208.01618): the concept is a word; no weight of the model changes.

The paper's: the denoising loss over the vector v* of one new word, everything else frozen (Eq. 2); v* starts at the vector of a
single-word description of the thing, here the class noun; base rate 0.005, multiplied by batch size and number of GPUs (0.04 there), 5,000
steps, on latent diffusion with a BERT text encoder. What its appendix tries and the text rejects (several words progressively, a
regulariser towards the class word, per-picture words) is left out.

Ours: a task may name several words, as the other methods here have two (`words` of the task; name one for the paper's form): they start at
the class noun's last words. `start="random"` draws the first word as CIDM does. Layer-wise vectors, off as in the paper, make it extended
textual inversion (P+). Since nothing but words is learned, nothing learned earlier can be forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..bank.composition import PROMPT
from ..bank.tokens import TokenGroup, initial_vectors
from ..model.backbone import AttentionProcessor
from .base import LearnedWords, Method, Outcome, Task, register, require, stored_dtype

STARTS = ("class", "random")


@dataclass(frozen=True)
class TextualInversionConfig:
    """start: "class" | "random", where the first word begins; first_std: its spread when random, 0 = that of the vocabulary;
    lr: of weights, of which there are none: accepted so that one set of settings can serve several methods, and not used."""

    token_lr: float = 5e-3
    lr: float = 0.0
    layerwise: bool = False
    start: str = "class"
    first_std: float = 0.0
    stored: str = "float16"

    def __post_init__(self) -> None:
        require(self.start in STARTS, "start", self.start, ", ".join(STARTS))
        for name in ("lr", "token_lr", "first_std"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        stored_dtype(self.stored)


class TextualInversion(Method):
    composition = PROMPT

    def __init__(self, config: TextualInversionConfig) -> None:
        self.config = config

    def begin(self, task: Task) -> None:
        c = self.config
        self.words = LearnedWords(task, c.layerwise, c.first_std)
        if c.start == "class":
            self._start_at_noun(task)

    @torch.no_grad()
    def _start_at_noun(self, task: Task) -> None:
        """All words are the class noun's; without one the single word stays random."""
        for encoder in task.backbone.text:
            vectors = self.words.vectors[encoder.name]
            if ids := encoder.ids(task.class_noun):
                start = initial_vectors(encoder.vectors(ids), vectors.shape[1] + 1, vectors.shape[0], 0.0, torch.Generator())
                vectors.copy_(start[:, 1:])

    def parameter_groups(self) -> list[dict]:
        return [{"params": list(self.words.parameters()), "lr": self.config.token_lr}]

    def token_group(self) -> TokenGroup:
        return self.words.group()

    def processor(self) -> AttentionProcessor:
        return AttentionProcessor()

    def finish(self) -> Outcome:
        return Outcome(self.words.stored(stored_dtype(self.config.stored)), {})

    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"words": self.words})


register("textual_inversion", TextualInversionConfig, TextualInversion, "learned words alone, no weight changes; forgets nothing")

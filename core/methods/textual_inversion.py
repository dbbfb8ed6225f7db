"""Textual inversion (Gal et al., ICLR 2023, arXiv 2208.01618): the concept is a word; no weight of the model
changes.

From the paper: the denoising loss over the vector v* of one new word, with everything else frozen (Eq. 2). v*
starts at the vector of a one-word description, here the class noun. Its base rate of 0.005 is multiplied by
batch size and number of GPUs (0.04 there), for 5,000 steps, on latent diffusion with a BERT text encoder.
What its appendix tries and the text rejects is left out: several words learned progressively, a regulariser
towards the class word, per-picture words.

Ours: a task may name several words, as other methods here have two; name one for the paper's form. They start
at the class noun's last words. `start="random"` draws the first word as CIDM does. Layer-wise vectors, off as
in the paper, make it extended textual inversion (P+). Only words are learned, so nothing learned earlier can
be forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..attention.adapters import NoAdapters
from ..conditioning.learned_words import LearnedWords
from ..settings import one_of, setting
from .base import Method, MethodConfig, Task, register

STARTS = ("class", "random")


@dataclass(frozen=True)
class TextualInversionConfig(MethodConfig):
    """start: where the first word begins, at the class noun or at random; first_std: its spread when random.

    lr is not used, since no weight is trained. It is accepted so that one set of settings can serve several
    methods.
    """

    lr: float = setting(0.0, "Not used, because no weight is trained.", 0.0, 1.0)
    token_lr: float = 5e-3
    layerwise: bool = False
    start: str = "class"

    limits = {"start": one_of(STARTS)}


@register("textual_inversion", TextualInversionConfig,
          "learned words only, no weight changes; forgets nothing")
class TextualInversion(Method):
    refinable = True
    config: TextualInversionConfig
    words: LearnedWords

    def begin(self, task: Task) -> None:
        super().begin(task)
        if self.config.start == "class":      # a single word without a class noun stays random
            self.words.start_from_noun(task.backbone, task.class_noun)

    def make_adapters(self) -> NoAdapters:
        return NoAdapters()

    def parameter_groups(self) -> list[dict[str, Any]]:
        return super().parameter_groups()[:1]

"""Trainable token vectors: the words of a concept that is being learned."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import nn

from ..bank.tokens import TokenGroup, initial_vectors
from ..errors import ConceptError
from ..model.backbone import Backbone
from ..model.storage import load_stored, stored

BYTES = 256      # the first entries of every CLIP vocabulary, enough to estimate its spread


class Words(nn.Module):
    """Trainable words.

    Attributes:
        names: Their names in prompts, written `<name>`.
        placeholder_noun: See `TokenGroup`.
    """

    names: tuple[str, ...]
    placeholder_noun: str = ""

    @abstractmethod
    def group(self) -> TokenGroup:
        """The current words, with gradient."""

    def stored(self, dtype: torch.dtype) -> TokenGroup:
        """Detached copies on the CPU in the bank's type."""
        group = self.group()
        return replace(group, vectors={name: stored(v, dtype) for name, v in group.vectors.items()})


class LearnedWords(Words):
    """One parameter `[L, n, D]` per text encoder, initialised as in CIDM (see tokens.initial_vectors).

    Args:
        backbone: Its vocabulary provides the vectors of the class noun.
        concept: the concept's name, for messages.
        names: The n words. If there is more than one, the class noun must not be empty.
        class_noun: Initialises all words but the first.
        layerwise: one vector per word and layer copy (L copies), else one per word (L = 1).
        first_std: Standard deviation of the first word's initial vector; 0 = that of the vocabulary.
        generator: Draws the first word's initial vector.
    """

    def __init__(self, backbone: Backbone, concept: str, names: tuple[str, ...], class_noun: str,
                 layerwise: bool, first_std: float, generator: torch.Generator) -> None:
        super().__init__()
        self.names = names
        copies = backbone.layout.copies if layerwise else 1
        self.vectors = nn.ParameterDict()
        for encoder in backbone.text:
            ids = encoder.ids(class_noun) if class_noun else []
            if len(names) > 1 and not ids:
                raise ConceptError(f"class noun of concept '{concept}' is empty; {len(names)} words need one "
                                   "to start from")
            noun = encoder.vectors(ids) if ids else torch.zeros(0, encoder.width)
            std = first_std or float(encoder.vectors(list(range(BYTES))).std())
            start = initial_vectors(noun, len(names), copies, std, generator)
            self.vectors[encoder.name] = nn.Parameter(start.to(backbone.device))

    @torch.no_grad()
    def start_from_noun(self, backbone: Backbone, class_noun: str) -> None:
        """Sets the words to the class noun's last tokens, the last one repeated. Without a noun, nothing."""
        for encoder in backbone.text:
            vectors = self.vectors[encoder.name]
            if ids := encoder.ids(class_noun):
                copies, words = vectors.shape[:2]
                start = initial_vectors(encoder.vectors(ids), words + 1, copies, 0.0, torch.Generator())
                vectors.copy_(start[:, 1:])

    def fix_to_noun(self, backbone: Backbone, class_noun: str) -> None:
        """Makes the class noun the words, for good, also where the rest of a prompt is encoded."""
        self.start_from_noun(backbone, class_noun)
        self.requires_grad_(False)
        self.placeholder_noun = class_noun

    def load(self, group: TokenGroup) -> None:
        """Sets the words to stored ones. Raises ConceptError if they do not fit."""
        for encoder, vectors in self.vectors.items():
            load_stored(vectors, group.vectors[encoder], f"the words for {encoder}")
        self.placeholder_noun = group.placeholder_noun

    def group(self) -> TokenGroup:
        return TokenGroup(self.names, dict(self.vectors.items()), self.placeholder_noun)

    def mean_norm(self) -> float:
        """Mean length of the vectors, over encoders, layer copies and words."""
        return float(torch.stack([v.detach().norm(dim=-1).mean() for v in self.vectors.values()]).mean())

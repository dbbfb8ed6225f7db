"""Token groups: the 1 to 3 learned words of a concept, one vector per text encoder and layer copy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ConceptError
from ..model.sites import SiteLayout

NAME = re.compile(r"[^\W_](?:[\w-]{0,62}[^\W_])?")     # letters and digits of any script, - and _ inside; 1..64 long
MAX_WORDS = 16


def check_name(name: str, what: str = "concept name") -> str:
    """The name itself when it is safe in prompts, files and tensor keys; ConceptError otherwise."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConceptError(f"{what} {name!r} is not allowed; use 1 to 64 letters, digits, '-' or '_', "
                           "beginning and ending with a letter or digit")
    return name


def default_words(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}-{i + 1}" for i in range(count))


@dataclass(frozen=True)
class TokenGroup:
    """words: their names, each usable alone as `<word>`; vectors: text encoder name -> `[L, n, D]`, L layer copies (1 = not layer-wise);
    stand_in: what stands for the words while everything else of a prompt is encoded, usually the class noun; "" = they are encoded
    together with it (see encoding)."""

    words: tuple[str, ...]
    vectors: Mapping[str, Tensor]
    placeholder_noun: str = ""

    @property
    def copies(self) -> int:
        return max(vector.shape[0] for vector in self.vectors.values())

    def check_fits(self, layout: SiteLayout, owner: str) -> None:
        """Raises ConceptError unless every text encoder of the base has its vectors in the right width."""
        for encoder, width in layout.text_widths:
            vector = self.vectors.get(encoder)
            if vector is None:
                held = ", ".join(sorted(self.vectors)) or "none"
                raise ConceptError(f"{owner} has no token vectors for text encoder '{encoder}'; it has {held}")
            if vector.ndim != 3 or vector.shape[1:] != (len(self.words), width) or vector.shape[0] not in (1, layout.copies):
                raise ConceptError(f"{owner} has token vectors of shape {tuple(vector.shape)} for '{encoder}'; this base needs "
                                   f"[1 or {layout.copies}, {len(self.words)}, {width}]")

    def word(self, position: int, encoder: str) -> Tensor:
        """Vectors of one word, `[L, D]`."""
        return self.vectors[encoder][:, position]

    def mean_copy(self) -> TokenGroup:
        """The same group with one copy, the mean over layers: the nearest thing that formats without layers can hold."""
        return replace(self, vectors={name: vector.mean(0, keepdim=True) for name, vector in self.vectors.items()})


def initial_vectors(class_vectors: Tensor, words: int, copies: int, std: float, generator: torch.Generator) -> Tensor:
    """CIDM's start: the first word is N(0, std), the others copy the class noun's vectors; all copies equal. `[copies, words, D]`.

    class_vectors: `[n, D]`, the vocabulary's vectors of the class noun, the last ones kept when n exceeds words - 1, and the
    last repeated when n is less. With `words = 1` there is only the random word (C-LoRA's token without class noun).
    """
    width = class_vectors.shape[1]
    first = torch.randn(1, width, generator=generator) * std
    rest = class_vectors.float().cpu()[-(words - 1):] if words > 1 else class_vectors.new_zeros(0, width).float()
    if words > 1 and len(rest) < words - 1:
        rest = torch.cat([rest, rest[-1:].expand(words - 1 - len(rest), width)])
    return torch.cat([first, rest]).unsqueeze(0).repeat(copies, 1, 1)

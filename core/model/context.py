"""Encoded prompts: the text input of the sites."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .sites import Site


@dataclass(frozen=True)
class Context:
    """Encoded prompts, one per row.

    Attributes:
        hidden: `[B, L, N, D]`. L is the number of layer copies, or 1 if no prompt contains a layer-wise word.
        pooled: `[B, P]` for model families with a pooled text embedding (SDXL), else None.
        words: One mapping per row: concept name -> positions of the concept's words among the N tokens.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    words: tuple[dict[str, tuple[int, ...]], ...] = ()

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def at(self, site: Site) -> Tensor:
        """The text states that one site reads, `[B, N, D]`."""
        return self.hidden[:, site.copy if self.hidden.shape[1] > 1 else 0]

    def __getitem__(self, rows: slice) -> Context:
        """The selected rows."""
        return Context(self.hidden[rows], None if self.pooled is None else self.pooled[rows],
                       self.words[rows])

    def repeated(self, length: int) -> Context:
        """The same prompts, repeated to `length` tokens, a multiple of N. Repetition does not change softmax
        attention.
        """
        n = self.hidden.shape[2]
        words = tuple({name: tuple(place + start for start in range(0, length, n) for place in places)
                       for name, places in row.items()} for row in self.words)
        return Context(self.hidden.repeat(1, 1, length // n, 1), self.pooled, words)

    @staticmethod
    def cat(parts: list[Context]) -> Context:
        """Joins the rows of several contexts. Repeats shorter contexts, and contexts without layer copies, to
        match the others.
        """
        copies = max(part.hidden.shape[1] for part in parts)
        length = math.lcm(*(part.hidden.shape[2] for part in parts))
        parts = [part.repeated(length) for part in parts]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        words = tuple(row for part in parts for row in part.words)
        hidden = torch.cat([part.hidden.expand(-1, copies, -1, -1) for part in parts])
        return Context(hidden, torch.cat(pooled) if len(pooled) == len(parts) else None, words)

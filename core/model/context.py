"""Encoded prompts, as the sites read them."""

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
        hidden: `[B, L, N, D]`. L = 1 where no layer-wise word is in the prompts, else the number of layer
            copies.
        pooled: `[B, P]` for model families that read a pooled text (SDXL), else None.
        words: For every row, concept name -> positions of its words among the N tokens.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    words: tuple[dict[str, tuple[int, ...]], ...] = ()

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def at(self, site: Site) -> Tensor:
        """What one site reads, `[B, N, D]`."""
        return self.hidden[:, site.copy if self.hidden.shape[1] > 1 else 0]

    def __getitem__(self, rows: slice) -> Context:
        """Some of the rows."""
        return Context(self.hidden[rows], None if self.pooled is None else self.pooled[rows],
                       self.words[rows])

    def repeated(self, length: int) -> Context:
        """The same prompts, repeated to `length` tokens, a multiple of N. Softmax does not see the
        repetition."""
        n = self.hidden.shape[2]
        words = tuple({name: tuple(place + start for start in range(0, length, n) for place in places)
                       for name, places in row.items()} for row in self.words)
        return Context(self.hidden.repeat(1, 1, length // n, 1), self.pooled, words)

    @staticmethod
    def cat(parts: list[Context]) -> Context:
        """Joins the rows of several contexts. Shorter contexts, and those without layer copies, are repeated
        to fit."""
        copies = max(part.hidden.shape[1] for part in parts)
        length = math.lcm(*(part.hidden.shape[2] for part in parts))
        parts = [part.repeated(length) for part in parts]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        words = tuple(row for part in parts for row in part.words)
        hidden = torch.cat([part.hidden.expand(-1, copies, -1, -1) for part in parts])
        return Context(hidden, torch.cat(pooled) if len(pooled) == len(parts) else None, words)

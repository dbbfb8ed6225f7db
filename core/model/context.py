"""Encoded prompts: the text input of the sites."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from .sites import Site

Strengths = tuple[dict[str, tuple[float, ...]], ...]


def strengths_or_none(strengths: Strengths) -> Strengths:
    """The strengths, or an empty tuple if all are 1."""
    return strengths if any(set(values) != {1.0} for row in strengths for values in row.values()) else ()


@dataclass(frozen=True)
class Context:
    """Encoded prompts, one per row.

    Attributes:
        hidden: `[B, L, N, D]`. L is the number of layer copies, or 1 if no prompt contains a layer-wise word.
        pooled: `[B, P]` for model families with a pooled text embedding (SDXL), else None.
        words: One mapping per row: concept name -> positions of the concept's words among the N tokens.
        strengths: One mapping per row: concept name -> factors on the concept's deltas at these positions.
            A missing concept has 1; an empty tuple means 1 everywhere.
        lengths: In a joint attention, the number of rows of each prompt; those behind them only fill it up
            and are not read. An empty tuple means that all rows are read.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    words: tuple[dict[str, tuple[int, ...]], ...] = ()
    strengths: Strengths = ()
    lengths: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def at(self, site: Site) -> Tensor:
        """The text states that one site reads, `[B, N, D]`."""
        return self.hidden[:, site.copy if self.hidden.shape[1] > 1 else 0]

    def __getitem__(self, rows: slice) -> Context:
        """The selected rows."""
        return Context(self.hidden[rows], None if self.pooled is None else self.pooled[rows],
                       self.words[rows], self.strengths[rows], self.lengths[rows])

    def repeated(self, length: int) -> Context:
        """The same prompts, repeated to `length` tokens, a multiple of N. Repetition does not change softmax
        attention.
        """
        n = self.hidden.shape[2]
        words = tuple({name: tuple(place + start for start in range(0, length, n) for place in places)
                       for name, places in row.items()} for row in self.words)
        strengths = tuple({name: values * (length // n) for name, values in row.items()}
                          for row in self.strengths)
        return Context(self.hidden.repeat(1, 1, length // n, 1), self.pooled, words, strengths)

    def with_concept(self, name: str, strength: float) -> Context:
        """The same prompts, with a concept whose deltas act at every token, times `strength`."""
        count = self.hidden.shape[2]
        words = tuple({**row, name: tuple(range(count))} for row in self.words)
        strengths = tuple({**row, name: (strength,) * count}
                          for row in self.strengths or [{}] * len(self.words))
        return replace(self, words=words, strengths=strengths_or_none(strengths))

    @staticmethod
    def cat(parts: list[Context]) -> Context:
        """Joins the rows of several contexts. Repeats contexts without layer copies to match the others.

        Shorter ones are repeated to one length, too. Those with `lengths` are filled up with zeros instead,
        because repetition changes a joint attention, whose softmax has other rows.
        """
        copies = max(part.hidden.shape[1] for part in parts)
        counts, lengths = [part.hidden.shape[2] for part in parts], list[int]()
        if any(part.lengths for part in parts):
            lengths = [length for part, count in zip(parts, counts, strict=True)
                       for length in part.lengths or (count,) * len(part)]
            parts = [replace(part, hidden=pad(part.hidden, (0, 0, 0, max(counts) - count)))
                     for part, count in zip(parts, counts, strict=True)]
        else:
            parts = [part.repeated(math.lcm(*counts)) for part in parts]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        words = tuple(row for part in parts for row in part.words)
        strengths = tuple(row for part in parts for row in part.strengths or [{}] * len(part.words))
        hidden = torch.cat([part.hidden.expand(-1, copies, -1, -1) for part in parts])
        return Context(hidden, torch.cat(pooled) if len(pooled) == len(parts) else None, words,
                       strengths_or_none(strengths), tuple(lengths))

    def fills(self) -> Tensor | None:
        """`[B, N]`: True at rows that only fill a prompt up; None where there are none."""
        count = self.hidden.shape[2]
        if all(length == count for length in self.lengths):
            return None
        lengths = torch.tensor(self.lengths, device=self.hidden.device)
        return torch.arange(count, device=self.hidden.device) >= lengths[:, None]

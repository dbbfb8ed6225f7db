"""How a prompt's tokens and learned words are laid out in rows for a text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..bank.prompts import Prompt, WordRef
from ..model.backbone import TextEncoder
from .placeholder_nouns import Words, noun_for

SLOT_ID = 0     # id at the position of a learned word; not the end token, because some encoders search for it
UNDIVIDED = 8      # shorter texts and placeholders are not divided between chunks, as in ComfyUI

Unit = tuple[int | WordRef, float]      # a token id or a learned word, and its weight


@dataclass(frozen=True)
class Row:
    """One prompt for one encoder, all chunks: the token id, the learned word and the weight at each position.
    """

    ids: list[int]
    words: Words
    weights: Sequence[float] = ()

    @property
    def has_words(self) -> bool:
        return any(word is not None for word in self.words)

    @property
    def key(self) -> tuple:
        return tuple(self.ids), tuple(self.words), tuple(self.weights)

    def with_nouns(self, nouns: Mapping[WordRef, int], but: str = "") -> Row:
        """Replaces words that have a placeholder noun by the noun, except the words of concept `but`."""
        found_nouns = [noun_for(word, nouns, but) for word in self.words]
        ids = [token if noun is None else noun for token, noun in zip(self.ids, found_nouns, strict=True)]
        words = [word if noun is None else None for word, noun in zip(self.words, found_nouns, strict=True)]
        return Row(ids, words, self.weights)


def groups_of(encoder: TextEncoder, prompt: Prompt) -> list[list[Unit]]:
    """The tokens of each text and of each run of a concept's words."""
    groups: list[list[Unit]] = []
    previous: WordRef | None = None
    for piece, weight in prompt.weighted:
        if isinstance(piece, str):
            groups.append([(token, weight) for token in encoder.ids(piece)])
            previous = None
            continue
        if previous == WordRef(piece.concept, piece.position - 1):
            groups[-1].append((piece, weight))
        else:
            groups.append([(piece, weight)])
        previous = piece
    return groups


def chunks_of(encoder: TextEncoder, groups: Sequence[Sequence[Unit]]) -> list[list[Unit]]:
    """Distributes a prompt over chunks of at most `length - 2` units, as ComfyUI does."""
    chunks: list[list[Unit]] = [[]]
    for group in groups:
        rest = list(group)
        while rest:
            room = encoder.length - 2 - len(chunks[-1])
            taken = len(rest) if len(rest) <= room else room if len(group) >= UNDIVIDED else 0
            chunks[-1] += rest[:taken]
            rest = rest[taken:]
            if rest:
                chunks.append([])
    return chunks


def row_of(encoder: TextEncoder, chunks: Sequence[Sequence[Unit]], count: int) -> Row:
    """Lays out `count` chunks, each with begin, end and padding."""
    laid_out: list[Unit] = []
    for number in range(count):
        units = chunks[number] if number < len(chunks) else []
        laid_out += [(encoder.start, 1.0), *units, (encoder.end, 1.0)]
        laid_out += [(encoder.pad, 1.0)] * (-len(laid_out) % encoder.length)
    return Row([SLOT_ID if isinstance(unit, WordRef) else unit for unit, _ in laid_out],
                [unit if isinstance(unit, WordRef) else None for unit, _ in laid_out],
                [weight for _, weight in laid_out])

"""Placeholder nouns keep learned words from changing the rest of a prompt and each other. Our own method.

A text encoder mixes all words of a prompt. A concept with a placeholder noun (usually its class noun) is
therefore encoded separately. The rest of the prompt is encoded with the noun in place of the concept's words.
The concept's words are encoded in a prompt where nouns replace all other concepts. Naming a concept then only
changes the states at its own words. The library and ComfyUI share these rules; only running the text encoder
differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..bank.prompts import WordRef
from ..bank.tokens import TokenGroup
from ..model.backbone import TextEncoder

Words = Sequence[WordRef | None]      # the learned word at each token position, None where there is none


def placeholder_noun_ids(encoder: TextEncoder, noun: str, count: int) -> list[int]:
    """The last `count` token ids of "a <noun>"; if there are fewer, the first one is repeated."""
    ids = (encoder.ids(f"a {noun}") or [encoder.pad])[-count:]
    return [ids[0]] * (count - len(ids)) + ids


def noun_ids(encoder: TextEncoder, groups: Mapping[str, TokenGroup]) -> dict[WordRef, int]:
    """Learned word -> the token id that replaces it, for concepts with a placeholder noun."""
    ids_of: dict[WordRef, int] = {}
    for name, group in groups.items():
        if group.placeholder_noun:
            ids = placeholder_noun_ids(encoder, group.placeholder_noun, len(group.words))
            ids_of |= {WordRef(name, i): token for i, token in enumerate(ids)}
    return ids_of


def encoded_apart(words: Iterable[WordRef | None], nouns: Mapping[WordRef, int]) -> list[str]:
    """Concepts of these words that are encoded separately, in order, without repetition."""
    return list(dict.fromkeys(word.concept for word in words if word is not None and word in nouns))


def noun_for(word: WordRef | None, nouns: Mapping[WordRef, int], but: str = "") -> int | None:
    """The token id that replaces a learned word; None if the token stays.

    Args:
        word: The learned word at a position, or None.
        nouns: See `noun_ids`.
        but: A concept whose words are not replaced.
    """
    return None if word is None or word.concept == but else nouns.get(word)


def positions_of(words: Iterable[WordRef | None]) -> dict[str, tuple[int, ...]]:
    """Concept -> the token positions of its words, in order."""
    positions: dict[str, list[int]] = {}
    for position, word in enumerate(words):
        if word is not None:
            positions.setdefault(word.concept, []).append(position)
    return {name: tuple(found) for name, found in positions.items()}


def with_words(rest: Tensor, own: Tensor, positions: Iterable[int]) -> Tensor:
    """Inserts the states of a separately encoded concept at its words.

    Args:
        rest: States of the prompt, `[..., N, D]`.
        own: States of the prompt with the concept's words in place, of a shape that broadcasts with `rest`.
        positions: Positions of the concept's words, 0 to N - 1.
    """
    mask = torch.zeros(rest.shape[-2], 1, dtype=torch.bool)
    mask[list(positions)] = True
    return torch.where(mask.to(rest.device), own, rest)

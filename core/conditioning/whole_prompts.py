"""Prompts for text encoders that take no learned vectors: concepts are encoded as their class nouns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch.nn.functional import pad

from ..bank.prompts import Prompt, WordRef
from ..bank.tokens import TokenGroup
from ..errors import ConceptError
from ..model.backbone import TextPiece, WholePromptEncoder, WholeText
from ..model.context import Context, strengths_or_none

MEMORY_LIMIT = 512     # prompts; further ones are not kept


def repeated_noun(concept: str, noun: str, words: int) -> str:
    """The text that stands for a concept's words where they cannot be encoded themselves.

    Raises:
        ConceptError: There is no class noun.
    """
    if not noun.strip():
        raise ConceptError(f"concept '{concept}' has no class noun, and this model encodes prompts with it; "
                           "learn the concept with a class noun such as dog")
    return " ".join([noun] * words)


def pieces_of(prompt: Prompt, groups: Mapping[str, TokenGroup],
              by_strength: Collection[str]) -> list[TextPiece]:
    """The texts of a prompt, and one piece with class nouns for each run of a concept's words."""
    pieces: list[TextPiece] = []
    previous: WordRef | None = None
    for piece, weight in prompt.weighted:
        if isinstance(piece, str):
            pieces.append(TextPiece(piece, weight))
            previous = None
            continue
        name = piece.concept
        text = repeated_noun(name, groups[name].placeholder_noun, 1)
        if previous == WordRef(name, piece.position - 1):
            text = f"{pieces.pop().text} {text}"
        pieces.append(TextPiece(text, 1.0 if name in by_strength else weight, name))
        previous = piece
    return pieces


def encode_whole(encoder: WholePromptEncoder, prompts: Sequence[Prompt], groups: Mapping[str, TokenGroup],
                 by_strength: Collection[str],
                 memory: dict[tuple[TextPiece, ...], WholeText] | None = None,
                 is_joint: bool = False) -> Context:
    """`encode_prompts` for an encoder that takes no learned vectors.

    Args:
        groups: Concept -> its words.
        by_strength: As for `encode_prompts`.
        memory: Prompts that were encoded already; new ones are added. No text is then encoded twice while a
            concept is learned, because states do not depend on what is learned.
        is_joint: Whether text and picture share one softmax, where rows that fill a text up are not read.
    """
    memory, encoded = {} if memory is None else memory, []
    for prompt in prompts:
        pieces = tuple(pieces_of(prompt, groups, by_strength))
        whole = memory.get(pieces) or WholeText(*encoder.encode_pieces(pieces))
        if len(memory) < MEMORY_LIMIT:
            memory[pieces] = whole
        encoded.append(whole)
    longest = max(text.states.shape[1] for text in encoded)
    hidden = torch.cat([pad(text.states, (0, 0, 0, longest - text.states.shape[1])) for text in encoded])
    strengths = tuple(_strengths(prompt, text, groups) for prompt, text in zip(prompts, encoded, strict=True))
    pooled = [text.pooled for text in encoded if text.pooled is not None]
    words = tuple({name: tuple(rows) for name, rows in found.items()} for found in strengths)
    factors = tuple({name: tuple(rows.values()) for name, rows in found.items() if name in by_strength}
                    for found in strengths)
    return Context(hidden.unsqueeze(1), torch.cat(pooled) if pooled else None, words,
                   strengths_or_none(factors),
                   tuple(text.states.shape[1] for text in encoded) if is_joint else ())


def _strengths(prompt: Prompt, text: WholeText,
               groups: Mapping[str, TokenGroup]) -> dict[str, dict[int, float]]:
    """Concept -> the weight at each row of its nouns. Each place where a prompt names it has its own."""
    found: dict[str, dict[int, float]] = {}
    named = [piece for piece in pieces_of(prompt, groups, ()) if piece.concept]
    for piece, rows in zip(named, text.mentions, strict=True):
        if rows:      # not cut off
            found.setdefault(piece.concept, {}).update(dict.fromkeys(rows, piece.weight))
    return found

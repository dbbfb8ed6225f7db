"""A CLIP that lets ComfyUI's own nodes use placeholders such as `<rex>`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..bank.bank import ConceptBank
from ..bank.prompts import NO_CONCEPTS, Vocabulary, WordRef
from ..conditioning.placeholder_nouns import positions_of
from ..conditioning.routing import by_strength
from ..sampling.attention_guidance import Subject
from .concept_encoder import ConceptEncoder, KnownConcept, Wrapped
from .concept_tokenizer import ConceptTokenizer, log
from .noun_clip import NounEncoder, NounId, NounTokenizer
from .text import ROW_NAMES, encoder_names, reads_rows, row_tokenizer, row_tokens


def learned_positions(clip, prompt: str) -> tuple[int, ...]:
    """Positions of a prompt's learned words in its first chunk, or of all its words if none is learned."""
    chunk = _chunk(clip, prompt)
    learned = [i for i, (token, *_) in enumerate(chunk) if _is_word(token)]
    if not learned and reads_rows(clip):
        return tuple(range(max(1, _text_length(clip, chunk))))
    return tuple(learned) or tuple(range(1, max(2, len(chunk) - 1 - _padding(chunk))))


def subject_of(clip, prompt: str) -> Subject:
    """Positions of a prompt's concepts and its text in the first chunk; empty without concepts."""
    if not isinstance(clip.tokenizer, ConceptTokenizer):
        return Subject((), ())
    tokens = [token for token, *_ in _chunk(clip, prompt)]
    if reads_rows(clip):
        positions = positions_of(WordRef(token.concept, 0) if isinstance(token, NounId) else None
                                 for token in tokens)
        return Subject(tuple(positions.values()), tuple(range(_text_length(clip, _chunk(clip, prompt)))))
    end_id = getattr(clip.tokenizer, encoder_names(clip)[0]).end_token
    ends = (i for i, token in enumerate(tokens) if not torch.is_tensor(token) and token == end_id)
    end = next(ends, len(tokens))
    pieces = clip.tokenizer.vocabulary.parse(prompt).pieces
    words = iter([piece for piece in pieces if isinstance(piece, WordRef)])      # words may be cut off
    positions = positions_of(next(words, None) if torch.is_tensor(token) else None for token in tokens)
    return Subject(tuple(positions.values()), tuple(range(1, end)))


def _chunk(clip, prompt: str) -> list[tuple]:
    """The tokens and weights of a prompt's first chunk."""
    tokens = clip.tokenize(prompt)
    return row_tokens(tokens) if any(name in tokens for name in ROW_NAMES) else next(iter(tokens.values()))[0]


def _is_word(token) -> bool:
    return torch.is_tensor(token) or isinstance(token, NounId)


def _text_length(clip, chunk) -> int:
    """Number of tokens in front of the end of a text that is read as rows."""
    end = row_tokenizer(clip).end_token
    return next((i for i, (token, *_) in enumerate(chunk) if token == end), len(chunk))


def _padding(chunk) -> int:
    """Number of padding tokens at the end of a chunk."""
    same = 0
    while same < len(chunk) - 1 and chunk[-1 - same][0] == chunk[-2 - same][0]:
        same += 1
    return same


def concept_clip(clip, bank: ConceptBank, reads_weights: bool, acting: Mapping[str, float] | None = None,
                 tell: Callable[[str], None] = log):
    """Returns a CLIP that also accepts the bank's placeholders. If names clash with embedding files, the
    bank's concept is used.

    The given CLIP is not changed. For an empty bank it is returned itself.

    Args:
        clip: A CLIP of ComfyUI.
        bank: The concepts.
        reads_weights: As of the MODEL's `Family`; only read for a text that is read as rows.
        acting: Prompt-activated concepts whose deltas are in the MODEL -> their weight in the prompt that
            decided so. In other prompts, another weight acts on the words as on text, with a note.
            None = every prompt brings its own deltas.
        tell: Takes notes on prompts that this CLIP reads.
    """
    if not len(bank):
        return clip
    tokenizer, encoder = clip.tokenizer, clip.cond_stage_model
    earlier = tokenizer if isinstance(tokenizer, ConceptTokenizer) else None
    concepts = {} if earlier is None else dict(earlier.concepts)
    weighed = by_strength(bank, bank.names)
    concepts |= {concept.name: KnownConcept(concept.info, concept.tokens, concept.name in weighed)
                 for concept in bank}
    if earlier is not None and acting is not None:
        acting = {**(earlier.acting or {}), **acting}
    original = tokenizer if earlier is None else earlier.original
    inner = encoder.inner if isinstance(encoder, Wrapped) else encoder
    clone = clip.clone()
    if reads_rows(clip):
        clone.tokenizer = NounTokenizer(original, concepts, acting, tell, reads_weights)
        clone.cond_stage_model = NounEncoder(inner, concepts, acting)
        return clone
    encoders = encoder_names(clip)
    clone.tokenizer = ConceptTokenizer(original, encoders, concepts, acting, tell)
    clone.cond_stage_model = ConceptEncoder(inner, encoders, concepts, clip, acting)
    return clone


def vocabulary_of(clip) -> Vocabulary:
    """The placeholders that a CLIP knows."""
    return clip.tokenizer.vocabulary if isinstance(clip.tokenizer, ConceptTokenizer) else NO_CONCEPTS


def encode(clip, prompt: str):
    """Encodes like CLIP Text Encode. A placeholder raises an error if the CLIP has no concepts."""
    if not isinstance(clip.tokenizer, ConceptTokenizer):
        NO_CONCEPTS.parse(prompt)
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))

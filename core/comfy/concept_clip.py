"""A CLIP that lets ComfyUI's own nodes use placeholders such as `<rex>`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping

import torch

from ..bank.bank import ConceptBank
from ..bank.composition import Kind
from ..bank.hints import notes_on
from ..bank.prompts import NO_CONCEPTS, Prompt, Vocabulary, WordRef
from ..conditioning.placeholder_nouns import positions_of
from ..conditioning.routing import by_strength
from ..sampling.attention_guidance import Subject
from .concept_encoder import ConceptEncoder, Concepts, KnownConcept, Wrapped, word_token
from .text import encoder_names

_MARK = "concept."      # ComfyUI's tokenizer gets a placeholder as `embedding:concept.<name>`


class ConceptTokenizer(Wrapped):
    """A CLIP's tokenizer with placeholders. A learned word becomes a token, see
    `concept_encoder.word_token`.

    Args:
        original: The CLIP's tokenizer.
        encoders: Names of its encoders.
        concepts: The concepts.
        acting, tell: See `concept_clip`.
    """

    def __init__(self, original, encoders: tuple[str, ...], concepts: Concepts,
                 acting: Mapping[str, float] | None, tell: Callable[[str], None]) -> None:
        super().__init__(copy.copy(original))
        self.original, self.concepts, self.acting, self.tell = original, concepts, acting, tell
        self.vocabulary = Vocabulary(known.info for known in concepts.values())
        self._told: set[str] = set()
        for encoder in encoders:
            setattr(self.inner, encoder, self._with_words(getattr(original, encoder), encoder))

    def tokenize_with_weights(self, text: str, *args, **kwargs):
        prompt = self.vocabulary.parse(text)     # raises for an unknown placeholder
        self._tell(prompt)
        marked = prompt.substituted(lambda name: f" embedding:{_MARK}{name} ")
        return self.inner.tokenize_with_weights(marked, *args, **kwargs)

    def _tell(self, prompt: Prompt) -> None:
        """Tells notes on a prompt, each once."""
        notes = [*notes_on(self.vocabulary, [prompt], loads_embeddings=True), *self._on_deltas(prompt)]
        fresh = [note for note in notes if note not in self._told]
        if fresh:
            self.tell("\n".join(fresh))
        self._told.update(fresh)

    def _on_deltas(self, prompt: Prompt) -> list[str]:
        """Notes on concepts whose deltas follow another node's prompt."""
        notes = []
        for name in prompt.concepts:
            known = self.concepts[name]
            if self.acting is None or not known.by_strength or known.info.composes.kind is not Kind.PROMPT:
                continue
            weight, acting = prompt.strength_of(name), self.acting.get(name)
            if acting is None:
                notes.append(f"a prompt names <{name}>, but the prompt of Elastic Weight Aggregate does not, "
                             "so its words act without its deltas; name it there too")
            elif weight not in (1.0, acting):
                notes.append(f"the weight {weight:g} of <{name}> acts on its words as on text; the prompt of "
                             "Elastic Weight Aggregate decides the strength of its deltas, so give the "
                             "weight there too")
        return notes

    def _with_words(self, tokenizer, encoder: str):
        """Copies an SDTokenizer. Its `embedding:` look-up finds learned words before files."""
        clone = copy.copy(tokenizer)
        files = tokenizer._try_get_embedding
        clone.embedding_directory = []
        arity = len(clone._try_get_embedding("nothing"))      # results, more since 0.33
        clone.embedding_directory = tokenizer.embedding_directory or []

        def look_up(embedding_name: str):
            first, _, rest = embedding_name.partition(" ")
            if not first.startswith(_MARK):
                return files(embedding_name)
            words = self.vocabulary.entries[first.removeprefix(_MARK)]
            vectors = torch.stack([word_token(self.concepts[word.concept].tokens.word(
                word.position, encoder).float(), word) for word in words])      # [words, L + 1, D]
            return (vectors, rest.strip()) if arity == 2 else (vectors, first, rest.strip())

        clone._try_get_embedding = look_up
        return clone


def learned_positions(clip, prompt: str) -> tuple[int, ...]:
    """Positions of a prompt's learned words in its first chunk, or of all its words if none is learned."""
    chunk = next(iter(clip.tokenize(prompt).values()))[0]
    learned = [i for i, (token, *_) in enumerate(chunk) if torch.is_tensor(token)]
    return tuple(learned) or tuple(range(1, max(2, len(chunk) - 1 - _padding(chunk))))


def subject_of(clip, prompt: str) -> Subject:
    """Positions of a prompt's concepts and its text in the first chunk; empty without concepts."""
    if not isinstance(clip.tokenizer, ConceptTokenizer):
        return Subject((), ())
    chunk = next(iter(clip.tokenize(prompt).values()))[0]
    tokens = [token for token, *_ in chunk]
    end_id = getattr(clip.tokenizer, encoder_names(clip)[0]).end_token
    ends = (i for i, token in enumerate(tokens) if not torch.is_tensor(token) and token == end_id)
    end = next(ends, len(tokens))
    pieces = clip.tokenizer.vocabulary.parse(prompt).pieces
    words = iter([piece for piece in pieces if isinstance(piece, WordRef)])      # words may be cut off
    positions = positions_of(next(words, None) if torch.is_tensor(token) else None for token in tokens)
    return Subject(tuple(positions.values()), tuple(range(1, end)))


def _padding(chunk) -> int:
    """Number of padding tokens at the end of a chunk."""
    same = 0
    while same < len(chunk) - 1 and chunk[-1 - same][0] == chunk[-2 - same][0]:
        same += 1
    return same


def log(text: str) -> None:
    logging.warning("Continual Concepts: %s", text)


def concept_clip(clip, bank: ConceptBank, acting: Mapping[str, float] | None = None,
                 tell: Callable[[str], None] = log):
    """Returns a CLIP that also accepts the bank's placeholders. If names clash with embedding files, the
    bank's concept is used.

    The given CLIP is not changed. For an empty bank it is returned itself.

    Args:
        clip: A CLIP of ComfyUI.
        bank: The concepts.
        acting: Prompt-activated concepts whose deltas are in the MODEL -> their weight in the prompt that
            decided so. In other prompts, another weight acts on the words as on text, with a note.
            None = every prompt brings its own deltas.
        tell: Takes notes on prompts that this CLIP reads.
    """
    if not len(bank):
        return clip
    tokenizer, encoder, encoders = clip.tokenizer, clip.cond_stage_model, encoder_names(clip)
    earlier = tokenizer if isinstance(tokenizer, ConceptTokenizer) else None
    concepts = {} if earlier is None else dict(earlier.concepts)
    weighed = by_strength(bank, bank.names)
    concepts |= {concept.name: KnownConcept(concept.info, concept.tokens, concept.name in weighed)
                 for concept in bank}
    if earlier is not None and acting is not None:
        acting = {**(earlier.acting or {}), **acting}
    original = tokenizer if earlier is None else earlier.original
    inner = encoder.inner if isinstance(encoder, ConceptEncoder) else encoder
    clone = clip.clone()
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

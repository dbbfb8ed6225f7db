"""A CLIP's tokenizer with placeholders such as `<rex>`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping

import torch

from ..bank.composition import Kind
from ..bank.hints import notes_on
from ..bank.prompts import Prompt, Vocabulary
from .concept_encoder import Concepts, Wrapped, word_token

_MARK = "concept."      # ComfyUI's tokenizer gets a placeholder as `embedding:concept.<name>`


def log(text: str) -> None:
    logging.warning("Continual Concepts: %s", text)


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
                notes.append(f"a prompt names <{name}>, but the prompt of Apply Concepts does not, "
                             "so its words act without its deltas; name it there too")
            elif weight not in (1.0, acting):
                notes.append(f"the weight {weight:g} of <{name}> acts on its words as on text; the prompt of "
                             "Apply Concepts decides the strength of its deltas, so give the "
                             "weight there too")
        return notes

    def _with_words(self, tokenizer, encoder: str):
        """Copies an SDTokenizer. Its `embedding:` look-up finds learned words before files."""
        clone, files = copy.copy(tokenizer), tokenizer._try_get_embedding
        # not `self`, which holds the copy: a cycle would keep the concepts in memory
        vocabulary, concepts = self.vocabulary, self.concepts
        clone.embedding_directory = []
        arity = len(clone._try_get_embedding("nothing"))      # results, more since 0.33
        clone.embedding_directory = tokenizer.embedding_directory or []

        def look_up(embedding_name: str):
            first, _, rest = embedding_name.partition(" ")
            if not first.startswith(_MARK):
                return files(embedding_name)
            words = vocabulary.entries[first.removeprefix(_MARK)]
            vectors = torch.stack([word_token(concepts[word.concept].tokens.word(
                word.position, encoder).float(), word) for word in words])      # [words, L + 1, D]
            return (vectors, rest.strip()) if arity == 2 else (vectors, first, rest.strip())

        clone._try_get_embedding = look_up
        return clone

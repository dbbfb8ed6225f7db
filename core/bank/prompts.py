"""Prompts: `a photo of <rex> on a beach`, parsed once into text and the learned words of concepts.

The grammar is that of `grammar`; docs/prompts.md describes it.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..errors import ConceptError
from .concepts import ConceptInfo
from .grammar import PLACEHOLDER, Part, Placeholder, check_letters, literal, parts_of, written

PLACE = "{}"      # of the concept, in prompts and captions for any concept


@dataclass(frozen=True)
class WordRef:
    """One learned word: the concept, and the position of the word in it."""

    concept: str
    position: int


Piece = str | WordRef


@dataclass(frozen=True)
class Prompt:
    """A parsed prompt. Entry points parse prompts once; all other functions take this value.

    text: as typed. pieces: learned words and the non-empty texts between them, in order. weights: one per
    piece; empty = all are 1. parts: the texts and placeholders of which the pieces were made.
    """

    text: str
    pieces: tuple[Piece, ...]
    weights: tuple[float, ...] = ()
    parts: tuple[Part, ...] = field(default=(), compare=False, repr=False)

    @cached_property
    def weighted(self) -> tuple[tuple[Piece, float], ...]:
        """The pieces, each with its weight."""
        return tuple(zip(self.pieces, self.weights or [1.0] * len(self.pieces), strict=True))

    @cached_property
    def concepts(self) -> tuple[str, ...]:
        """Names of the concepts in the prompt, in order, without repetition."""
        return tuple(dict.fromkeys(piece.concept for piece in self.pieces if isinstance(piece, WordRef)))

    def weights_of(self, concept: str) -> tuple[float, ...]:
        """The different weights of a concept's words, in order."""
        return tuple(dict.fromkeys(weight for piece, weight in self.weighted
                                   if isinstance(piece, WordRef) and piece.concept == concept))

    def strength_of(self, concept: str) -> float:
        """Factor on a concept's deltas where one number acts for the whole prompt: its first weight; 1 if the
        prompt does not name it.
        """
        return next(iter(self.weights_of(concept)), 1.0)

    @cached_property
    def placeholders(self) -> tuple[str, ...]:
        """Names of the placeholders, of concepts or of single words, in order."""
        return tuple(part.name for part, _ in self.parts if isinstance(part, Placeholder))

    @cached_property
    def placeholder_weights(self) -> tuple[float, ...]:
        """Their weights, in the same order."""
        return tuple(weight for part, weight in self.parts if isinstance(part, Placeholder))

    def substituted(self, replacement: Callable[[str], str]) -> str:
        """The prompt with `replacement(name)` in place of every placeholder, and with its weights."""
        return written(self.parts, replacement)

    def plain(self, infos: Mapping[str, ConceptInfo]) -> str:
        """The text with class nouns in place of concepts, for text alignment (CIDM's protocol)."""
        pieces = _with_class_nouns(self.weighted, infos)
        text = "".join(piece for piece, _ in pieces if isinstance(piece, str))
        return re.sub(r"\s+", " ", text).strip()

    def apart(self, infos: Mapping[str, ConceptInfo]) -> dict[str, Prompt]:
        """Concept -> the prompt with class nouns in place of all other concepts."""
        return {name: _joined(_with_class_nouns(self.weighted, infos, but=name), infos)
                for name in self.concepts}


_Weighted = tuple[Piece, float]


def _with_class_nouns(pieces: Iterable[_Weighted], infos: Mapping[str, ConceptInfo],
                      but: str = "") -> Iterator[_Weighted]:
    """Replaces each run of a concept's words by one class noun, except the words of concept `but`."""
    previous = ""      # the concept of the last word, as long as only spaces follow it
    for piece, weight in pieces:
        if isinstance(piece, str):
            yield piece, weight
            previous = "" if piece.strip() else previous
        else:
            if piece.concept == but:
                yield piece, weight
            elif piece.concept != previous:
                yield infos[piece.concept].class_noun, weight
            previous = piece.concept


def _joined(pieces: Iterable[_Weighted], infos: Mapping[str, ConceptInfo]) -> Prompt:
    """A prompt of these pieces. Adjacent texts of one weight are joined so that they are tokenized together.
    """
    merged: list[_Weighted] = []
    for piece, weight in pieces:
        last, last_weight = merged[-1] if merged else (None, 1.0)
        if isinstance(piece, str) and isinstance(last, str) and weight == last_weight:
            merged[-1] = last + piece, weight
        else:
            merged.append((piece, weight))
    merged = [(piece, weight) for piece, weight in merged if piece != ""]
    parts: list[Part] = [(piece, weight) if isinstance(piece, str)
                         else (Placeholder(infos[piece.concept].words[piece.position]), weight)
                         for piece, weight in merged]
    return _prompt(written(parts, "<{}>".format, "()<>"), merged, parts)


def _prompt(text: str, pieces: Sequence[_Weighted], parts: Sequence[Part]) -> Prompt:
    weights = tuple(weight for _, weight in pieces)
    is_weighted = any(weight != 1.0 for weight in weights)
    return Prompt(text, tuple(piece for piece, _ in pieces), weights if is_weighted else (), tuple(parts))


def words_prompt(infos: Sequence[ConceptInfo]) -> Prompt:
    """All words of these concepts and nothing else, with a space between concepts."""
    return Vocabulary(infos).parse(" ".join(info.placeholder for info in infos))


class Vocabulary:
    """Which placeholders exist: `<name>` for a whole concept, `<word>` for one of its words."""

    def __init__(self, infos: Iterable[ConceptInfo]) -> None:
        self.infos = {info.name: info for info in infos}
        self.entries: dict[str, tuple[WordRef, ...]] = {}      # placeholder -> its words
        for info in self.infos.values():
            words = tuple(WordRef(info.name, i) for i in range(len(info.words)))
            single = [(word, (ref,)) for word, ref in zip(info.words, words, strict=True)]
            for name, refs in [(info.name, words), *single]:
                previous = self.entries.setdefault(name, refs)
                if previous[0].concept != info.name:
                    raise ConceptError(f"placeholder <{name}> would mean concept '{previous[0].concept}' and "
                                       f"concept '{info.name}'; rename one of them")
        self._by_letters = {unicodedata.normalize("NFKC", name): name for name in self.entries}

    def known(self, typed: str) -> str | None:
        """The name of a placeholder, or None. Letters that are typed in another form, such as an accent of
        its own or full width, count as the same.
        """
        return typed if typed in self.entries else self._by_letters.get(unicodedata.normalize("NFKC", typed))

    def parse(self, prompt: str | Prompt, what: str = "the prompt") -> Prompt:
        """Parses a prompt. A parsed prompt is returned unchanged.

        Args:
            prompt: The text.
            what: Where it comes from, for messages.

        Raises:
            ConceptError: A placeholder belongs to no concept, or a weight is not finite.
        """
        if isinstance(prompt, Prompt):
            return prompt
        parts = parts_of(check_letters(prompt, what), self.known, lambda name: self._unknown(name, what))
        pieces: list[_Weighted] = []
        for part, weight in parts:
            own: tuple[Piece, ...] = self.entries[part.name] if isinstance(part, Placeholder) else (part,)
            pieces += [(piece, weight) for piece in own]
        return _prompt(prompt, pieces, parts)

    def literal(self, prompt: Prompt, replacement: Callable[[str], str]) -> str:
        """The prompt as typed, with `replacement(name)` in place of every placeholder; see `grammar`."""
        return literal(prompt.text, self.known, replacement)

    def parse_caption(self, caption: str, what: str = "the prompt") -> Prompt:
        """Parses a training caption, in which everything but `<name>` is text. `what` is as for `parse`.

        Raises:
            ConceptError: A placeholder belongs to no concept.
        """
        caption = unicodedata.normalize("NFC", check_letters(caption, what))
        pieces: list[Piece] = []
        end = 0
        for match in PLACEHOLDER.finditer(caption):
            if match[1] not in self.entries:
                raise ConceptError(self._unknown(match[1], what))
            pieces += [caption[end:match.start()], *self.entries[match[1]]]
            end = match.end()
        pieces.append(caption[end:])
        return Prompt(caption, tuple(piece for piece in pieces if piece != ""))

    def parse_all(self, prompts: Iterable[str | Prompt]) -> list[Prompt]:
        return [self.parse(prompt) for prompt in prompts]

    def knows(self, text: str) -> bool:
        """Whether every placeholder `<name>` in a text exists."""
        return all(name in self.entries for name in PLACEHOLDER.findall(text))

    def near(self, name: str) -> str:
        """The name that is most similar to this one, whatever the case of its letters; empty if none is."""
        folded = {known.casefold(): known for known in sorted(self.entries, reverse=True)}
        found = difflib.get_close_matches(name.casefold(), folded, n=1)
        return folded[found[0]] if found else ""

    def _unknown(self, name: str, what: str) -> str:
        names = sorted(self.entries)
        if not names:
            return f"{what} names <{name}>, but no bank was given, or it holds no concept"
        near = self.near(name)
        known = f"known: {', '.join(f'<{n}>' for n in names[:12])}"
        hint = f"did you mean <{near}>?" if near else known
        return f"{what} names <{name}>, which the bank does not hold; {hint}"


NO_CONCEPTS = Vocabulary(())      # for prompts in which no placeholder is allowed


def filled_templates(templates: Iterable[str], name: str, words: tuple[str, ...]) -> list[Prompt]:
    """Parses prompts in which `{}` stands for a concept that need not be in a bank."""
    vocabulary = Vocabulary([ConceptInfo(name, "", "", words)])
    return vocabulary.parse_all([template.format(f"<{name}>") for template in templates])


def caption_with_placeholder(caption: str, info_name: str, class_noun: str) -> str:
    """Makes a training caption name the concept. The placeholder replaces the class noun if the caption has
    it, else it goes in front.

    In a caption with {}, this is its place. A caption with placeholders is returned unchanged.
    """
    caption = unicodedata.normalize("NFC", caption)
    if PLACE in caption:
        return caption.replace(PLACE, f"<{info_name}>")
    if PLACEHOLDER.search(caption):
        return caption
    placeholder = f"<{info_name}>"
    if class_noun:
        noun = rf"\b{re.escape(class_noun)}\b"
        replaced, count = re.subn(noun, placeholder, caption, count=1, flags=re.IGNORECASE)
        if count:
            return replaced
    return f"a photo of {placeholder}" if not caption.strip() else f"{placeholder}, {caption.strip()}"

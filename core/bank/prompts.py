"""Prompts: `a photo of <rex> on a beach`, parsed once into text and the learned words of concepts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..errors import ConceptError
from .concepts import ConceptInfo

PLACEHOLDER = re.compile(r"<([\w-]+)>")


@dataclass(frozen=True)
class WordRef:
    """One learned word: the concept, and the position of the word in it."""

    concept: str
    position: int


Piece = str | WordRef


@dataclass(frozen=True)
class Prompt:
    """A parsed prompt. Entry points parse prompts once; all other functions take this value.

    text: as typed. pieces: learned words and the non-empty texts between them, in order.
    """

    text: str
    pieces: tuple[Piece, ...]

    @cached_property
    def concepts(self) -> tuple[str, ...]:
        """Names of the concepts in the prompt, in order, without repetition."""
        return tuple(dict.fromkeys(piece.concept for piece in self.pieces if isinstance(piece, WordRef)))

    @cached_property
    def placeholders(self) -> tuple[str, ...]:
        """Names between `<` and `>` as typed, of concepts or of single words, in order."""
        return tuple(PLACEHOLDER.findall(self.text))

    def substituted(self, replacement: Callable[[str], str]) -> str:
        """The text with `replacement(name)` in place of every placeholder."""
        return PLACEHOLDER.sub(lambda match: replacement(match[1]), self.text)

    def plain(self, infos: Mapping[str, ConceptInfo]) -> str:
        """The text with class nouns in place of concepts, for text alignment (CIDM's protocol)."""
        text = _joined(_with_class_nouns(self.pieces, infos), infos).text
        return re.sub(r"\s+", " ", text).strip()

    def apart(self, infos: Mapping[str, ConceptInfo]) -> dict[str, Prompt]:
        """Concept -> the prompt with class nouns in place of all other concepts."""
        return {name: _joined(_with_class_nouns(self.pieces, infos, but=name), infos)
                for name in self.concepts}


def _with_class_nouns(pieces: Iterable[Piece], infos: Mapping[str, ConceptInfo],
                      but: str = "") -> Iterator[Piece]:
    """Replaces each run of a concept's words by one class noun, except the words of concept `but`."""
    previous = ""      # the concept of the last word, as long as only spaces follow it
    for piece in pieces:
        if isinstance(piece, str):
            yield piece
            previous = "" if piece.strip() else previous
        else:
            if piece.concept == but:
                yield piece
            elif piece.concept != previous:
                yield infos[piece.concept].class_noun
            previous = piece.concept


def _joined(pieces: Iterable[Piece], infos: Mapping[str, ConceptInfo]) -> Prompt:
    """A prompt of these pieces. Adjacent texts are joined so that they are tokenized together."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if isinstance(piece, str) and isinstance(last, str):
            merged[-1] = last + piece
        else:
            merged.append(piece)
    typed = (piece if isinstance(piece, str) else f"<{infos[piece.concept].words[piece.position]}>"
             for piece in merged)
    return Prompt("".join(typed), tuple(piece for piece in merged if piece != ""))


def words_prompt(infos: Sequence[ConceptInfo]) -> Prompt:
    """All words of these concepts and nothing else, with a space between concepts."""
    pieces: list[Piece] = []
    for info in infos:
        pieces += [" "] * bool(pieces) + [WordRef(info.name, i) for i in range(len(info.words))]
    return Prompt(" ".join(info.placeholder for info in infos), tuple(pieces))


class Vocabulary:
    """Which placeholders exist: `<name>` for a whole concept, `<word>` for one of its words."""

    def __init__(self, infos: Iterable[ConceptInfo]) -> None:
        self.entries: dict[str, tuple[WordRef, ...]] = {}      # placeholder -> its words
        for info in infos:
            words = tuple(WordRef(info.name, i) for i in range(len(info.words)))
            single = [(word, (ref,)) for word, ref in zip(info.words, words, strict=True)]
            for name, refs in [(info.name, words), *single]:
                previous = self.entries.setdefault(name, refs)
                if previous[0].concept != info.name:
                    raise ConceptError(f"placeholder <{name}> would mean concept '{previous[0].concept}' and "
                                       f"concept '{info.name}'; rename one of them")

    def parse(self, prompt: str | Prompt) -> Prompt:
        """Parses a prompt. A parsed prompt is returned unchanged.

        Raises:
            ConceptError: A placeholder belongs to no concept.
        """
        if isinstance(prompt, Prompt):
            return prompt
        pieces: list[Piece] = []
        end = 0
        for match in PLACEHOLDER.finditer(prompt):
            refs = self.entries.get(match[1])
            if refs is None:
                raise ConceptError(self._unknown(match[1]))
            pieces += [prompt[end:match.start()], *refs]
            end = match.end()
        pieces.append(prompt[end:])
        return Prompt(prompt, tuple(piece for piece in pieces if piece != ""))

    def parse_all(self, prompts: Iterable[str | Prompt]) -> list[Prompt]:
        return [self.parse(prompt) for prompt in prompts]

    def knows(self, text: str) -> bool:
        """Whether every placeholder in the text exists."""
        return all(name in self.entries for name in PLACEHOLDER.findall(text))

    def _unknown(self, name: str) -> str:
        names = sorted(self.entries)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"known: {', '.join(f'<{n}>' for n in names[:12])}" if names else "the bank is empty"
        hint = f"did you mean <{near[0]}>?" if near else hint
        return f"the prompt names <{name}>, which the bank does not hold; {hint}"


NO_CONCEPTS = Vocabulary(())      # for prompts in which no placeholder is allowed


def filled_templates(templates: Iterable[str], name: str, words: tuple[str, ...]) -> list[Prompt]:
    """Parses prompts in which `{}` stands for a concept that need not be in a bank."""
    vocabulary = Vocabulary([ConceptInfo(name, "", "", words)])
    return vocabulary.parse_all([template.format(f"<{name}>") for template in templates])


def caption_with_placeholder(caption: str, info_name: str, class_noun: str) -> str:
    """Makes a training caption name the concept. The placeholder replaces the class noun if the caption has
    it, else it goes in front.

    A caption with placeholders is returned unchanged.
    """
    if PLACEHOLDER.search(caption):
        return caption
    placeholder = f"<{info_name}>"
    if class_noun:
        noun = rf"\b{re.escape(class_noun)}\b"
        replaced, count = re.subn(noun, placeholder, caption, count=1, flags=re.IGNORECASE)
        if count:
            return replaced
    return f"a photo of {placeholder}" if not caption.strip() else f"{placeholder}, {caption.strip()}"

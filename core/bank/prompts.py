"""Placeholders in prompts: `a photo of <rex> on a beach` becomes text pieces and words of concepts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConceptError
from .concepts import ConceptInfo

PLACEHOLDER = re.compile(r"<([\w-]+)>")


@dataclass(frozen=True)
class WordRef:
    """One learned word: which concept, which of its words."""

    concept: str
    position: int


Piece = str | WordRef


class Vocabulary:
    """Which placeholders exist: `<name>` for a whole concept, `<word>` for one of its words. Look-up takes constant time."""

    def __init__(self, infos: Iterable[ConceptInfo]) -> None:
        self.entries: dict[str, tuple[WordRef, ...]] = {}
        for info in infos:
            words = tuple(WordRef(info.name, i) for i in range(len(info.words)))
            for name, refs in [(info.name, words), *((word, (ref,)) for word, ref in zip(info.words, words, strict=True))]:
                previous = self.entries.setdefault(name, refs)
                if previous[0].concept != info.name:
                    raise ConceptError(f"placeholder <{name}> would mean concept '{previous[0].concept}' and concept '{info.name}'; "
                                       "rename one of them")

    def parse(self, prompt: str) -> list[Piece]:
        """Text and words in order. Raises ConceptError for a placeholder that no concept has."""
        pieces: list[Piece] = []
        end = 0
        for match in PLACEHOLDER.finditer(prompt):
            refs = self.entries.get(match[1])
            if refs is None:
                raise ConceptError(self._unknown(match[1]))
            pieces += [prompt[end:match.start()], *refs]
            end = match.end()
        pieces.append(prompt[end:])
        return [piece for piece in pieces if piece != ""]

    def _unknown(self, name: str) -> str:
        names = sorted(self.entries)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"known: {', '.join(f'<{n}>' for n in names[:12])}" if names else "the bank is empty"
        hint = f"did you mean <{near[0]}>?" if near else hint
        return f"the prompt names <{name}>, which the bank does not hold; {hint}"


def named_concepts(pieces: Sequence[Piece]) -> list[str]:
    """Concepts that a parsed prompt names, each once, in order."""
    return list(dict.fromkeys(piece.concept for piece in pieces if isinstance(piece, WordRef)))


def plain_text(pieces: Sequence[Piece], infos: Mapping[str, ConceptInfo]) -> str:
    """The prompt with every concept replaced by its class noun: what text alignment is measured against (CIDM's protocol)."""
    text, previous = "", None
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            previous = piece if piece.strip() else previous
        elif not (isinstance(previous, WordRef) and previous.concept == piece.concept):
            text += infos[piece.concept].class_noun
            previous = piece
    return re.sub(r"\s+", " ", text).strip()


def caption_with_placeholder(caption: str, info_name: str, class_noun: str) -> str:
    """A training caption that names the concept: in place of the class noun, else in front. One with placeholders is left as it is."""
    if PLACEHOLDER.search(caption):
        return caption
    placeholder = f"<{info_name}>"
    if class_noun:
        replaced, count = re.subn(rf"\b{re.escape(class_noun)}\b", placeholder, caption, count=1, flags=re.IGNORECASE)
        if count:
            return replaced
    return f"a photo of {placeholder}" if not caption.strip() else f"{placeholder}, {caption.strip()}"

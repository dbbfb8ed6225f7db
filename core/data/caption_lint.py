"""Warnings about captions as a whole: what most of them say, and which of them do not name the subject."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from ..bank.concepts import ConceptInfo
from ..bank.prompts import PLACE, PLACEHOLDER, caption_with_placeholder
from .pictures import Picture
from .report import PhotoWarning, listed

FEWEST = 3      # captions; of fewer, nothing can be told
LONGEST = 6      # words of a phrase
SHOWN = 4      # phrases in a warning
# Words that say nothing about a picture's content. A phrase needs one that is not among them.
_EMPTY = frozenset((
    "a", "an", "the", "this", "that", "one", "its", "his", "her", "their", "it", "and", "or", "of", "in",
    "on", "at", "by", "to", "with", "for", "from", "is", "are", "as", "there", "close", "up", "closeup",
    "photo", "photograph", "picture", "image", "snapshot", "shot", "view", "painting", "drawing", "style"))
_PIECE = re.compile(r"<[^<>]*>|[^\w\s'-]")      # ends a phrase: a placeholder, or a punctuation mark


def _phrases(caption: str) -> set[str]:
    """All phrases of a caption that begin and end with a word of content, in lower case."""
    found = set()
    for piece in _PIECE.split(caption.casefold()):
        words = piece.split()
        for first in range(len(words)):
            for end in range(first + 1, min(first + LONGEST, len(words)) + 1):
                phrase = words[first:end]
                if phrase[0] not in _EMPTY and phrase[-1] not in _EMPTY:
                    found.add(" ".join(phrase))
    return found


def common_phrases(captions: Sequence[str]) -> dict[str, int]:
    """Phrases that more than half of the captions have -> in how many they stand, most frequent first. A part
    of a longer phrase is left out if it stands in no further caption.

    Args:
        captions: With placeholders; a phrase does not reach over them.
    """
    if len(captions) < FEWEST:
        return {}
    counts = Counter(phrase for caption in captions for phrase in _phrases(caption))
    common = {phrase: count for phrase, count in counts.items() if 2 * count > len(captions)}
    longest = {phrase: count for phrase, count in common.items()
               if not any(phrase != other and f" {phrase} " in f" {other} " and common[other] == count
                          for other in common)}
    return dict(sorted(longest.items(), key=lambda item: (-item[1], item[0])))


def caption_warnings(pictures: Sequence[Picture], concept: ConceptInfo) -> list[PhotoWarning]:
    """Warnings about phrases that most captions have, and about captions that do not name the subject.

    Args:
        pictures: Photos of the concept; those without a caption and those with a caption template do not
            count.
        concept: What is learned.
    """
    written = [(i, picture) for i, picture in enumerate(pictures)
               if picture.caption.strip() and PLACE not in picture.caption and not picture.is_prior]
    texts = {i: caption_with_placeholder(picture.caption, concept.name, concept.class_noun)
             for i, picture in written}
    warnings = []
    common = common_phrases(list(texts.values()))
    if common:
        named = [f"'{phrase}' ({count} of {len(written)})" for phrase, count in list(common.items())[:SHOWN]]
        warnings.append(PhotoWarning(
            "caption", f"most captions have {listed(named)}; {concept.placeholder} is then learned together "
            "with these words. Leave them out where they describe the subject itself, else vary them"))
    bare = [(i, picture) for i, picture in written if PLACEHOLDER.search(picture.caption) is None
            and texts[i].endswith(f", {unicodedata.normalize('NFC', picture.caption).strip()}")]
    if bare and concept.class_noun:
        whole = len(bare) == len(written)
        which = "no caption names" if whole else (
            f"{listed(picture.caption_name or f'caption {i + 1}' for i, picture in bare)} "
            f"{'does' if len(bare) == 1 else 'do'} not name")
        warnings.append(PhotoWarning(
            "caption", f"{which} the subject as '{concept.class_noun}' or {concept.placeholder}, so "
            f"{concept.placeholder} goes in front. If another word names it, write {concept.placeholder} "
            "there", tuple(i for i, _ in bare)))
    return warnings

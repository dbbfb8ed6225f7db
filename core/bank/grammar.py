"""The grammar of prompts: placeholders, weights and escapes, as docs/prompts.md describes them.

Weights of text are those of ComfyUI: `(red)` weighs 1.1, `(red:1.3)` weighs 1.3, and the innermost number
holds. A backslash makes a bracket ordinary text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from ..errors import ConceptError

PLACEHOLDER = re.compile(r"<([\w-]+)>")      # the exact form, whose name must exist
EMPHASIS = 1.1      # weight of a pair of parentheses without a number, as in ComfyUI
_DEEPEST = 100      # pairs of parentheses inside one another

_BRACKETS = re.compile(r"(?<!\\)[<＜]([^<>＜＞\n]*)(?<!\\)[>＞]")
_COLON = re.compile("[:：]")
# Noncharacters of Unicode, which no text contains, replace escaped brackets and placeholders.
_ESCAPES = {"\\(": "\ufdd0", "\\)": "\ufdd1", "\\<": "\ufdd2", "\\>": "\ufdd3"}
_MARK = "\ufdd4"
_MARK_ALONE = re.compile(rf"(?<!\\)\(\s*{_MARK}\s*(?:[:：]\s*[-+.\w]*\s*)?\)")      # in parentheses


@dataclass(frozen=True)
class Placeholder:
    """A placeholder in a prompt. name: the vocabulary's name of it, of a concept or of a single word."""

    name: str


Part = tuple[str | Placeholder, float]      # a text or a placeholder, and its weight


def check_letters(text: str, what: str) -> str:
    """Returns a text that tokenizers can read.

    Args:
        what: Description of the text, for messages.

    Raises:
        ConceptError: It holds half a character (a lone surrogate), or one that Unicode reserves for programs.
    """
    odd = next((letter for letter in text if "\ud800" <= letter <= "\udfff"
                or "\ufdd0" <= letter <= "\ufdef"), "")
    if odd:
        raise ConceptError(f"{what} holds U+{ord(odd):04X}, which is no letter; type this place again")
    return text


def number_of(text: str) -> float | None:
    """A finite number, or None for any other text."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def parts_of(text: str, known: Callable[[str], str | None], unknown: Callable[[str], str]) -> list[Part]:
    """The texts and the placeholders of a prompt, each with its weight, in order.

    Args:
        text: The prompt.
        known: Returns the vocabulary's name for what stands between the brackets, or None.
        unknown: Returns the message for the exact form `<name>` of an unknown name.

    Raises:
        ConceptError: A placeholder of the exact form is unknown, a weight is not finite, or parentheses are
            nested too deeply.
    """
    masked, found = _masked(text, known, unknown)
    for escape, mark in _ESCAPES.items():
        masked = masked.replace(escape, mark)
    remaining = iter(found)
    parts: list[Part] = []
    for segment, weight in _weighted(masked, 1.0, 0):
        for i, piece in enumerate(segment.split(_MARK)):
            if i > 0:
                placeholder, own = next(remaining)
                parts.append((placeholder, weight if own is None else own))
            if piece:
                parts.append((_shown(piece), weight))
    return parts


def _masked(text: str, known: Callable[[str], str | None],
            unknown: Callable[[str], str]) -> tuple[str, list[tuple[Placeholder, float | None]]]:
    """The text with a mark in place of each placeholder, and the placeholders with their own weights.
    Arguments and errors as for `parts_of`."""
    found: list[tuple[Placeholder, float | None]] = []

    def mask(match: re.Match) -> str:
        typed, *rest = _COLON.split(match[1].strip(), maxsplit=1)
        name, weight = known(typed.strip()), number_of(rest[0]) if rest else None
        if name is None and PLACEHOLDER.fullmatch(match[0]):
            raise ConceptError(unknown(typed))
        if name is None or (rest and weight is None):
            return match[0]
        found.append((Placeholder(name), weight))
        return _MARK

    return _BRACKETS.sub(mask, text), found


def literal(text: str, known: Callable[[str], str | None], replacement: Callable[[str], str]) -> str:
    """A prompt as it was typed, and `replacement(name)` in place of placeholders, for encoders that take
    parentheses and weights as text. A weight that belongs to a placeholder alone is left out."""
    masked, found = _masked(text, known, str)
    count = 1
    while count:
        masked, count = _MARK_ALONE.subn(_MARK, masked)
    masked, remaining = re.sub(r"\\([<>])", r"\1", masked), iter(found)
    return re.sub(_MARK, lambda _: replacement(next(remaining)[0].name), masked)


def written(parts: Iterable[Part], replacement: Callable[[str], str], brackets: str = "()") -> str:
    """A prompt with these parts, and `replacement(name)` in place of placeholders.

    brackets: those that get a backslash in texts.
    """
    text, follows_text = "", False      # whether a text without parentheses stands in front
    for part, weight in parts:
        is_text = isinstance(part, str)
        new = (re.sub(f"[{brackets}]", r"\\\g<0>", part) if isinstance(part, str)
               else replacement(part.name))
        # texts that are tokenized separately stay separate
        has_own = weight != 1.0 or (is_text and follows_text)
        text += f"({new}:{weight!r})" if has_own else new
        follows_text = is_text and not has_own
    return text


def _shown(text: str) -> str:
    for escape, mark in _ESCAPES.items():
        text = text.replace(mark, escape[1])
    return text


def _weighted(text: str, weight: float, depth: int) -> Iterator[tuple[str, float]]:
    """Segments of a text and their weights."""
    if depth > _DEEPEST:
        raise ConceptError(f"the prompt has more than {_DEEPEST} pairs of parentheses inside one another; "
                           r"write \( and \) for parentheses that are text")
    for segment in _top_level(text):
        if len(segment) < 2 or segment[0] != "(" or segment[-1] != ")":
            yield segment, weight
            continue
        inner, own = segment[1:-1], weight * EMPHASIS
        head, _, tail = inner.rpartition(":")
        if head:
            with suppress(ValueError):
                own, inner = float(tail), head
        if not math.isfinite(own):
            raise ConceptError(f"the weight in '{_shown(segment).replace(_MARK, '<...>')}' is {own}; "
                               "allowed: a finite number such as 1.2")
        yield from _weighted(inner, own, depth + 1)


def _top_level(text: str) -> Iterator[str]:
    """Splits a text at its outermost parentheses, which stay at their part. Where parentheses are unbalanced,
    the result is that of ComfyUI.
    """
    depth = start = 0
    for i, character in enumerate(text):
        if character == "(":
            if depth == 0 and i > start:
                yield text[start:i]
                start = i
            depth += 1
        elif character == ")":
            depth -= 1
            if depth == 0:
                yield text[start:i + 1]
                start = i + 1
    if start < len(text):
        yield text[start:]

"""What the author of a concept states about its use: a licence and a name, one line each.

Model browsers read the same from the keys `modelspec.license` and `modelspec.author` of a file's metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from ..errors import ConceptError

LONGEST = 200      # characters of a line
_KEYS = {"licence": "modelspec.license", "author": "modelspec.author"}      # field -> key of the metadata


def _fault(text: object) -> str:
    """What is wrong with a line; empty if nothing is."""
    if not isinstance(text, str):
        return "is no text"
    if len(text) > LONGEST:
        return f"has {len(text)} characters"
    return "" if text.isprintable() else f"is {text!r}, with a sign that cannot be printed"


@dataclass(frozen=True)
class Terms:
    """The licence and the author of a concept; empty if nobody stated them.

    Raises:
        ConceptError: A line is no text, is too long or has several lines.
    """

    licence: str = ""
    author: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            text = getattr(self, field.name)
            if found := _fault(text):
                raise ConceptError(f"the {field.name} {found}; allowed: one line of up to {LONGEST} "
                                   "characters")

    def __bool__(self) -> bool:
        return bool(self.licence or self.author)

    def __str__(self) -> str:
        """Such as `licence CC BY 4.0, by Ann`; empty if nothing is stated."""
        return ", ".join([*([f"licence {self.licence}"] if self.licence else []),
                          *([f"by {self.author}"] if self.author else [])])

    def filled(self, other: Terms) -> Terms:
        """These terms, with those of the other where nothing is stated here."""
        return Terms(self.licence or other.licence, self.author or other.author)

    def to_json(self) -> dict[str, str]:
        """What is stated, by field."""
        return {name: text for name in _KEYS if (text := getattr(self, name))}

    def to_metadata(self) -> dict[str, str]:
        return {_KEYS[name]: text for name, text in self.to_json().items()}

    @classmethod
    def from_json(cls, data: Mapping) -> Terms:
        """Reads what `to_json` wrote; unknown keys are ignored."""
        return cls(**{name: data[name] for name in _KEYS if name in data})

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Terms:
        """Reads any program's metadata. Several lines become one, and long ones are cut."""
        return cls(**{name: one_line(metadata[key]) for name, key in _KEYS.items() if key in metadata})


def one_line(text: str) -> str:
    """A text as one printable line of up to LONGEST characters. The end of a longer one becomes `...`."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST - 3]}..."


def joined(terms: Mapping[str, Terms]) -> Terms:
    """The terms of several concepts or files as one: `rex: CC BY 4.0; mimi: CC0`, or what all of them state.

    Args:
        terms: Name -> its terms.
    """
    def line(field: str) -> str:
        stated = {name: text for name, one in terms.items() if (text := getattr(one, field))}
        if len(set(stated.values())) == 1 and len(stated) == len(terms):
            return next(iter(stated.values()))
        return one_line("; ".join(f"{name}: {text}" for name, text in stated.items()))

    return Terms(line("licence"), line("author"))

"""A concept: what was learned in one task, and where it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace

from ..errors import ConceptError
from ..model.deltas import Deltas, check_fits
from ..model.sites import SiteLayout
from ..model.slots import SLOTS
from .composition import Composition, Kind, of_older_file
from .grammar import PLACEHOLDER
from .terms import Terms
from .tokens import MAX_WORDS, TokenGroup, check_name, word_after

KINDS = ("object", "style")
OWN = "<>"      # stands for the concept in stored captions, so that they survive renaming


@dataclass(frozen=True)
class Provenance:
    """How a concept was learned. Using the concept does not need this.

    Args:
        base: Fingerprint of the base model's weights.
        images: Digest of every training photo.
        settings: The method's and the training's settings, as JSON values.
        versions: Library -> version.
        date: ISO 8601, UTC.
        steps, seconds: How long learning took. For a refined concept these and `settings` are of the last
            run, and `images` has the photos of all runs.
        refined: Earlier runs of a refined concept, oldest first: date, steps, seconds, and number of photos.
        captions: Different captions of the photos of all runs, with `OWN` for the concept. Refining draws
            pictures of them.
        variant_of: Name of the concept that learning started from, as it was called then; empty for none.
    """

    base: str = ""
    images: tuple[str, ...] = ()
    settings: Mapping = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""
    steps: int = 0
    seconds: float = 0.0
    refined: tuple[Mapping, ...] = ()
    captions: tuple[str, ...] = ()
    variant_of: str = ""


_LIST = (list, tuple)      # a tuple where `to_json` was not written to a file
# field of a provenance -> its JSON types, those of its entries, and what a message calls them
_TYPES: dict[str, tuple[tuple[type, ...], tuple[type, ...], str]] = {
    "base": ((str,), (), "a text"),
    "date": ((str,), (), "a text"),
    "variant_of": ((str,), (), "a text"),
    "steps": ((int,), (), "a whole number"),
    "seconds": ((int, float), (), "a number"),
    "settings": ((dict,), (dict, list), "an object of objects and lists"),      # imported ones list files
    "versions": ((dict,), (str,), "an object of texts"),
    "images": (_LIST, (str,), "a list of texts"),
    "refined": (_LIST, (dict,), "a list of objects"),
    "captions": (_LIST, (str,), "a list of texts"),
}


def _check_origin(name: str, origin: Mapping) -> None:
    """Raises ConceptError if a field of a provenance is of another type than `ConceptInfo.to_json` writes."""
    for key, value in origin.items():
        own, inner, allowed = _TYPES[key]
        entries = value.values() if isinstance(value, dict) else value if isinstance(value, _LIST) else ()
        if not isinstance(value, own) or not all(isinstance(entry, inner) for entry in entries):
            raise ConceptError(f"provenance '{key}' of concept '{name}' is {str(value)[:80]!r}; allowed: "
                               f"{allowed}")


@dataclass(frozen=True)
class ConceptInfo:
    """The part of a concept in a bank's header, enough to list the concept and to route prompts.

    composition: how it acts together with others; None if the file does not store it, see `composes`.
    terms: the licence and the author.
    """

    name: str
    class_noun: str
    method: str
    words: tuple[str, ...]
    kind: str = "object"
    provenance: Provenance = field(default_factory=Provenance)
    composition: Composition | None = None
    terms: Terms = Terms()

    def __post_init__(self) -> None:
        check_name(self.name)
        for what, text in (("class noun", self.class_noun), ("method", self.method)):
            if not isinstance(text, str):
                raise ConceptError(f"{what} of concept '{self.name}' is {str(text)[:80]!r}; allowed: a text")
        for word in self.words:
            check_name(word, "word of a concept")
        if not 1 <= len(self.words) <= MAX_WORDS or len(set(self.words)) < len(self.words):
            raise ConceptError(f"concept '{self.name}' has words {list(self.words)}; allowed: 1 to "
                               f"{MAX_WORDS} different ones")
        if self.kind not in KINDS:
            kinds = ", ".join(KINDS)
            raise ConceptError(f"kind of concept '{self.name}' is {self.kind!r}; allowed: {kinds}")

    @property
    def placeholder(self) -> str:
        return f"<{self.name}>"

    @property
    def composes(self) -> Composition:
        return of_older_file(self.method) if self.composition is None else self.composition

    def to_json(self) -> dict:
        data = asdict(self)
        # files without these fields are written without them again
        for name in ("refined", "captions", "variant_of"):
            if not data["provenance"][name]:
                del data["provenance"][name]
        del data["composition"], data["terms"]
        data |= self.terms.to_json()
        return data if self.composition is None else {**data, "composition": self.composition.to_json()}

    @classmethod
    def from_json(cls, data: dict) -> ConceptInfo:
        """Reads what `to_json` wrote; unknown keys of a newer version are ignored."""
        names = {f.name for f in fields(Provenance)}
        origin = {key: value for key, value in data.get("provenance", {}).items() if key in names}
        _check_origin(str(data["name"]), origin)
        origin |= {key: tuple(origin.get(key, ())) for key in ("images", "refined", "captions")}
        composition = Composition.from_json(data["composition"]) if "composition" in data else None
        return cls(name=data["name"], class_noun=data["class_noun"], method=data["method"],
                   words=tuple(data["words"]), kind=data.get("kind", "object"),
                   provenance=Provenance(**origin), composition=composition, terms=Terms.from_json(data))


def _with_words(caption: str, renamed: Mapping[str, str]) -> str:
    """A caption with other names of words. renamed: old name -> new name."""
    return PLACEHOLDER.sub(lambda match: f"<{renamed.get(match[1], match[1])}>", caption)


@dataclass(frozen=True)
class Concept:
    """A learned concept. thumbnail: a small JPEG or PNG file as bytes, or empty."""

    info: ConceptInfo
    tokens: TokenGroup
    deltas: Deltas
    thumbnail: bytes = b""

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def slots(self) -> int:
        """The number of slots at a site, 0 for none."""
        return max((delta.shape[0] for (_, place), delta in self.deltas.items() if place == SLOTS), default=0)

    def check_fits(self, layout: SiteLayout) -> None:
        """Raises ConceptError unless words and deltas have the shapes that the layout needs."""
        owner = f"concept '{self.name}'"
        if self.tokens.words != self.info.words:
            raise ConceptError(f"{owner} has vectors for words {list(self.tokens.words)}; its words are "
                               f"{list(self.info.words)}")
        self.tokens.check_fits(layout, owner)
        check_fits(self.deltas, layout, owner)
        kind = self.info.composes.kind
        if self.slots and kind is not Kind.WORDS:
            raise ConceptError(f"{owner} has slots, which act through its words, and its composition is "
                               f"'{kind.value}'; allowed with slots: '{Kind.WORDS.value}'")

    def renamed(self, name: str) -> Concept:
        """The same concept under another name; words that were named after it follow, in captions, too."""
        old = self.name
        words = tuple(word_after(name, word[len(old):]) if f"{word}-".startswith(f"{old}-") else word
                      for word in self.info.words)
        captions = tuple(_with_words(caption, dict(zip(self.info.words, words, strict=True)))
                         for caption in self.info.provenance.captions)
        info = replace(self.info, name=name, words=words,
                       provenance=replace(self.info.provenance, captions=captions))
        return replace(self, info=info, tokens=replace(self.tokens, words=words))

    def digest(self) -> str:
        """16 hex digits that identify words and deltas, whatever the concept is called."""
        digest = hashlib.sha256(self.tokens.digest().encode())
        for key in sorted(self.deltas):
            delta = self.deltas[key]
            digest.update(repr((key, delta.scale)).encode())
            for tensor in delta.tensors():
                digest.update(tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def nbytes(self) -> int:
        tensors = [t for delta in self.deltas.values() for t in delta.tensors()]
        tensors += self.tokens.vectors.values()
        return sum(t.numel() * t.element_size() for t in tensors) + len(self.thumbnail)

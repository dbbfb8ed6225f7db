"""The concept bank: ordered concepts and the shared state of their methods. It is immutable: every change
returns a new bank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from ..errors import ConceptError
from ..model.sites import SiteLayout
from .concepts import Concept, ConceptInfo
from .prompts import Prompt, Vocabulary
from .tokens import TokenGroup, check_name


@dataclass(frozen=True)
class Entry:
    """A concept's header and a function that loads its tensors."""

    info: ConceptInfo
    load: Callable[[], Concept]


def _loaded(concept: Concept) -> Entry:
    return Entry(concept.info, lambda: concept)


class _Cached:
    """Reads a concept on first use and caches it; `passing` reads without caching."""

    def __init__(self, load: Callable[[], Concept]) -> None:
        self._load = load
        self._concept: Concept | None = None

    def __call__(self) -> Concept:
        if self._concept is None:
            self._concept = self._load()
        return self._concept

    def passing(self) -> Concept:
        return self._concept or self._load()


@dataclass(frozen=True)
class ConceptBank:
    """Concepts in the order in which they were learned.

    Concepts are immutable, so learning a new concept cannot change the stored tensors of an old one.

    Args:
        layout: The site layout of all concepts.
        entries: The concepts.
        shared: Method -> tensors that the method passes from task to task (CIDM's common subspace, C-LoRA's
            sum).
    """

    layout: SiteLayout
    entries: tuple[Entry, ...] = ()
    shared: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.infos) < len(self.entries):
            names = [entry.info.name for entry in self.entries]
            repeated = next(name for name in names if names.count(name) > 1)
            raise ConceptError(f"the bank holds two concepts '{repeated}'; names must differ")
        _ = self.vocabulary      # raises when two concepts claim one placeholder

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(entry.info for entry in self.entries)

    @cached_property
    def infos(self) -> dict[str, ConceptInfo]:
        return {entry.info.name: entry.info for entry in self.entries}

    @cached_property
    def _by_name(self) -> dict[str, Entry]:
        return {entry.info.name: entry for entry in self.entries}

    def parse(self, prompt: str | Prompt) -> Prompt:
        """Parses a prompt; raises ConceptError for a placeholder that the bank does not hold."""
        return self.vocabulary.parse(prompt)

    def token_groups(self, names: Iterable[str]) -> dict[str, TokenGroup]:
        """Concept -> its learned words."""
        return {name: self[name].tokens for name in names}

    @property
    def names(self) -> list[str]:
        return list(self.infos)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[Concept]:
        return (entry.load() for entry in self.entries)

    def __getitem__(self, name: str) -> Concept:
        return self._entry(name).load()

    def passing(self, name: str) -> Concept:
        """Loads a concept for a single use, without caching its tensors."""
        load = self._entry(name).load
        return load.passing() if isinstance(load, _Cached) else load()

    def _entry(self, name: str) -> Entry:
        if name not in self._by_name:
            raise ConceptError(f"the bank holds no concept '{name}'; it holds "
                               f"{', '.join(self.names) or 'none'}")
        return self._by_name[name]

    def add(self, concept: Concept, shared: Mapping[str, Mapping[str, Tensor]] | None = None) -> ConceptBank:
        """Returns the bank with one more concept. `shared` replaces the shared state of the methods it names.
        """
        if concept.name in self:
            raise ConceptError(f"the bank already holds a concept '{concept.name}'; choose another name or "
                               "remove it first")
        concept.check_fits(self.layout)
        return replace(self, entries=(*self.entries, _loaded(concept)),
                       shared={**self.shared, **(shared or {})})

    def remove(self, name: str) -> ConceptBank:
        """Returns the bank without one concept. It does not read the tensors, so damaged concepts can be
        removed.
        """
        removed = self._entry(name)
        return replace(self, entries=tuple(entry for entry in self.entries if entry is not removed))

    def first(self, count: int) -> ConceptBank:
        """Returns the bank with only its first `count` concepts. Shared state stays."""
        return replace(self, entries=self.entries[:count])

    def rename(self, old: str, new: str) -> ConceptBank:
        """Returns the bank with one concept renamed, in the same position."""
        check_name(new)
        if new in self and new != old:
            raise ConceptError(f"the bank already holds a concept '{new}'; choose another name")
        concept = self[old].renamed(new)
        entries = (_loaded(concept) if entry.info.name == old else entry for entry in self.entries)
        return replace(self, entries=tuple(entries))

    def replace(self, concept: Concept, shared: Mapping[str, Mapping[str, Tensor]] | None = None
                ) -> ConceptBank:
        """Returns the bank with a new version of a concept in its position. shared: see `add`."""
        concept.check_fits(self.layout)
        replaced = self._entry(concept.name)
        entries = (_loaded(concept) if entry is replaced else entry for entry in self.entries)
        return replace(self, entries=tuple(entries), shared={**self.shared, **(shared or {})})

    def merge(self, other: ConceptBank) -> ConceptBank:
        """Returns the concepts of this bank, then those of the other. A concept that both hold is there once.
        If both have shared state of a method, this bank's is kept, unless the other holds all its concepts.

        Raises:
            ConceptError: Both banks have different concepts of the same name, one of these cannot be read, or
                the banks are for different bases.
        """
        if self.layout.fingerprint != other.layout.fingerprint:
            raise ConceptError(f"the banks belong to different bases (one to {self.layout.describe()}; the "
                               f"other to {other.layout.describe()})")
        common = [name for name in other.names if name in self]
        for bank in (self, other):
            for name in common:
                bank.passing(name)      # what cannot be read is no other concept
        differing = [name for name in common if differ(name, self, other, reads=True)]
        if differing:
            names = ", ".join(map(repr, differing))
            raise ConceptError(f"both banks hold {names}; rename in one of them before merging")
        new = [entry for entry in other.entries if entry.info.name not in self]
        states = (self.shared, other.shared) if len(common) == len(self) else (other.shared, self.shared)
        return replace(self, entries=(*self.entries, *new), shared={**states[0], **states[1]})

    def lazily(self, info: ConceptInfo, load: Callable[[], Concept]) -> ConceptBank:
        """Returns the bank with one more concept, whose tensors are read on first use."""
        return replace(self, entries=(*self.entries, Entry(info, _Cached(load))))

    def check_fits(self, layout: SiteLayout) -> None:
        if self.layout.fingerprint != layout.fingerprint:
            raise ConceptError(f"the bank was made for another base ({self.layout.describe()}); this one has "
                               f"{layout.describe()}")


def _identity(bank: ConceptBank, name: str) -> tuple | None:
    """What stays of a concept when it is renamed; None if its tensors are damaged. A save must not fail
    because of the file that it replaces."""
    info = bank.infos[name]
    try:
        return bank.passing(name).digest(), info.class_noun, info.kind, info.method, info.composes
    except ConceptError:
        return None


def differ(name: str, stored: ConceptBank, bank: ConceptBank, reads: bool = False) -> bool:
    """Whether two banks hold different concepts of a name.

    Args:
        reads: Whether weights are always read and compared. Otherwise a date of learning is enough to tell
            runs apart; imported concepts have none.
    """
    old, new = (replace(info, composition=info.composes) for info in (stored.infos[name], bank.infos[name]))
    if old != new or (old.provenance.date and not reads):
        return old != new
    return _identity(stored, name) != _identity(bank, name)


def renamed_in(bank: ConceptBank, stored: ConceptBank) -> dict[str, str]:
    """Names of a bank file that a bank lacks -> new names of the same concepts in it.

    A name that the file has is never a new one: what it stood for might be lost.
    """
    gone = [name for name in stored.names if name not in bank]
    free: dict[tuple | None, list[str]] = {}
    for name in bank.names if gone else ():
        if name not in stored:
            free.setdefault(_identity(bank, name), []).append(name)
    free.pop(None, None)      # damaged ones are equal to none
    found = {}
    for name in gone if free else ():
        if names := free.get(_identity(stored, name)):
            found[name] = names.pop(0)
    return found

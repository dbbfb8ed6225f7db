"""The concept bank: ordered concepts and the state that their methods share. A value: every change gives a new bank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from ..errors import ConceptError
from ..model.sites import SiteLayout
from .concepts import Concept, ConceptInfo
from .prompts import Prompt, Vocabulary
from .tokens import TokenGroup, check_name


@dataclass(frozen=True)
class Entry:
    """A concept's header and the way to its tensors, read when first used."""

    info: ConceptInfo
    load: Callable[[], Concept]


def _loaded(concept: Concept) -> Entry:
    return Entry(concept.info, lambda: concept)


class _Kept:
    """Reads on first use and keeps what it read; `passing` reads without keeping."""

    def __init__(self, load: Callable[[], Concept]) -> None:
        self._load, self._concept = load, None

    def __call__(self) -> Concept:
        if self._concept is None:
            self._concept = self._load()
        return self._concept

    def passing(self) -> Concept:
        return self._concept or self._load()


@dataclass(frozen=True)
class ConceptBank:
    """Concepts in the order in which they were learned.

    layout: the sites that all concepts fit; shared: method name -> tensors that the method carries from task to task
    (CIDM's common subspace, C-LoRA's running sum, ...). Concepts never change in place, so a stored tensor of an old
    concept cannot be touched by learning a new one.
    """

    layout: SiteLayout
    entries: tuple[Entry, ...] = ()
    shared: Mapping[str, Mapping[str, Tensor]] = None

    def __post_init__(self) -> None:
        if self.shared is None:
            object.__setattr__(self, "shared", {})
        if len(self.infos) < len(self.entries):
            names = [entry.info.name for entry in self.entries]
            raise ConceptError(f"the bank holds two concepts '{next(n for n in names if names.count(n) > 1)}'; names must differ")
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
        """Parses a prompt that may name the bank's concepts; raises ConceptError for a placeholder that the bank does not hold."""
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
        """A concept of which only something made from it is needed: its tensors do not stay in memory for the bank's sake."""
        load = self._entry(name).load
        return load.passing() if isinstance(load, _Kept) else load()

    def _entry(self, name: str) -> Entry:
        if name not in self._by_name:
            raise ConceptError(f"the bank holds no concept '{name}'; it holds {', '.join(self.names) or 'none'}")
        return self._by_name[name]

    def add(self, concept: Concept, shared: Mapping[str, Mapping[str, Tensor]] | None = None) -> ConceptBank:
        """This bank and one more concept; `shared` replaces the shared state of the methods it names."""
        if concept.name in self:
            raise ConceptError(f"the bank already holds a concept '{concept.name}'; choose another name or remove it first")
        concept.check_fits(self.layout)
        return replace(self, entries=(*self.entries, _loaded(concept)), shared={**self.shared, **(shared or {})})

    def remove(self, name: str) -> ConceptBank:
        """This bank without one concept; its tensors are not read, so a damaged one can be removed."""
        gone = self._entry(name)
        return replace(self, entries=tuple(entry for entry in self.entries if entry is not gone))

    def first(self, count: int) -> ConceptBank:
        """This bank with its first `count` concepts alone: what later tasks added is gone with their records. Shared state stays."""
        return replace(self, entries=self.entries[:count])

    def rename(self, old: str, new: str) -> ConceptBank:
        """This bank with one concept under another name, in its old place."""
        check_name(new)
        if new in self and new != old:
            raise ConceptError(f"the bank already holds a concept '{new}'; choose another name")
        concept = self[old].renamed(new)
        return replace(self, entries=tuple(_loaded(concept) if entry.info.name == old else entry for entry in self.entries))

    def replace(self, concept: Concept) -> ConceptBank:
        """This bank with another record of a concept that it holds, in its old place."""
        concept.check_fits(self.layout)
        gone = self._entry(concept.name)
        return replace(self, entries=tuple(_loaded(concept) if entry is gone else entry for entry in self.entries))

    def merge(self, other: ConceptBank) -> ConceptBank:
        """This bank's concepts, then the other's. Equal names are refused: rename one first, nothing is dropped silently.

        Shared state: where both banks carry a method's state, this bank's is kept, since later tasks go on from it.
        """
        if self.layout.fingerprint != other.layout.fingerprint:
            raise ConceptError(f"the banks belong to different bases: {self.layout.describe()} and {other.layout.describe()}")
        double = [name for name in other.names if name in self]
        if double:
            raise ConceptError(f"both banks hold {', '.join(repr(n) for n in double)}; rename in one of them before merging")
        return replace(self, entries=(*self.entries, *other.entries), shared={**other.shared, **self.shared})

    def lazily(self, info: ConceptInfo, load: Callable[[], Concept]) -> ConceptBank:
        """This bank and one more concept whose tensors are read on first use."""
        return replace(self, entries=(*self.entries, Entry(info, _Kept(load))))

    def check_fits(self, layout: SiteLayout) -> None:
        if self.layout.fingerprint != layout.fingerprint:
            raise ConceptError(f"the bank was made for another base ({self.layout.describe()}); this one has {layout.describe()}")

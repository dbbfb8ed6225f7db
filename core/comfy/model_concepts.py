"""The concepts that a MODEL carries. Each acts once: a node replaces what an earlier node put in of the same
name.
"""

from __future__ import annotations

import uuid
from collections import ChainMap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce

from ..bank.bank import ConceptBank
from ..bank.prompts import Prompt, Vocabulary
from ..conditioning.routing import (
    SiteWeights,
    aggregate,
    folded_deltas,
    prompt_activated_names,
    prompt_deltas,
    token_lora_deltas,
)
from ..model.deltas import Deltas, weighted_sum
from .apply import KEY, drop_processor, fold, weight_patches, with_word_bound
from .families.base import Family


@dataclass(frozen=True)
class Carried:
    """Concepts of one bank in a MODEL.

    Attributes:
        bank: Later nodes may use all its concepts, also those that do not act yet.
        strength: Factor on the deltas.
        weights: Concept -> its weight at every site, for concepts in the MODEL's weights.
        word_bound: Names of those that act through their words.
        patches: ComfyUI's values of the weight patches; they identify the patches to remove.
    """

    bank: ConceptBank
    strength: float
    weights: SiteWeights
    word_bound: tuple[str, ...] = ()
    patches: tuple[object, ...] = ()

    @property
    def names(self) -> set[str]:
        """The concepts that act."""
        return {*self.weights, *self.word_bound}

    @property
    def prompt_activated(self) -> SiteWeights:
        """The weights of the prompt-activated concepts."""
        names = prompt_activated_names(self.bank)
        return {name: row for name, row in self.weights.items() if name in names}

    def without(self, names: Collection[str]) -> Carried:
        """The others. The bank stays whole, because shares of always-on concepts depend on their number."""
        return replace(self, weights={name: row for name, row in self.weights.items() if name not in names},
                       word_bound=tuple(name for name in self.word_bound if name not in names), patches=())


def concepts_in(model) -> tuple[Carried, ...]:
    """What a MODEL carries, in the order in which it was put in."""
    return model.get_attachment(KEY) or ()


def with_concepts(model, sites: Family, carried: Carried, deltas: Deltas | None = None):
    """Returns a clone of MODEL that carries these concepts too.

    Args:
        deltas: The sum of the deltas in the weights, if it is known already.
    """
    if deltas is None:
        deltas = folded_deltas(carried.bank, carried.weights)
    layerwise = any(concept.tokens.copies > 1 for concept in carried.bank)
    clone = fold(without_concepts(model, sites, carried.names), sites, {}, layerwise).clone()
    before, patches = concepts_in(clone), weight_patches(sites, deltas) if deltas else {}
    if patches:
        clone.add_patches(patches)
    if carried.word_bound:
        word_bound = token_lora_deltas(carried.bank, carried.strength, carried.word_bound)
        clone = with_word_bound(clone, sites, word_bound)
    clone.set_attachments(KEY, (*before, replace(carried, patches=tuple(patches.values()))))
    return clone


def without_concepts(model, sites: Family, names: Collection[str]):
    """Returns a clone of MODEL without these concepts; MODEL itself if none of them acts in it."""
    found = concepts_in(model)
    if not any(carried.names & set(names) for carried in found):
        return model
    clone = model.clone()
    ours = {id(value) for carried in found for value in carried.patches}
    for key, entries in list(clone.patches.items()):
        clone.patches[key] = [entry for entry in entries if id(entry[1]) not in ours]
        if not clone.patches[key]:
            del clone.patches[key]
    clone.patches_uuid = uuid.uuid4()      # the host compares weights by it
    clone.remove_attachments(KEY)
    drop_processor(clone)
    for carried in found:
        clone = with_concepts(clone, sites, carried.without(names))
    return clone


def without_prompt_activated(model, sites: Family) -> tuple[object, Deltas]:
    """Takes the prompt-activated concepts out of a MODEL's weights.

    Returns:
        A clone of MODEL, and their summed deltas, which act in the scene instead.
    """
    found = concepts_in(model)
    names = {name for carried in found for name in carried.prompt_activated}
    deltas = [folded_deltas(carried.bank, carried.prompt_activated) for carried in found]
    return without_concepts(model, sites, names), added(deltas)


def added(deltas: Sequence[Deltas]) -> Deltas:
    """The sum of several concepts' deltas."""
    terms = [term for term in deltas if term]
    if len(terms) < 2:
        return terms[0] if terms else {}
    return {key: weighted_sum([(1.0, term[key]) for term in terms if key in term])
            for key in dict.fromkeys(key for term in terms for key in term)}


class KnownConcepts:
    """The concepts that the prompts of a sampling may name: those of its bank, then those of the banks that
    the MODEL carries.

    Args:
        bank: The sampling's own bank.
        strength: Factor on the deltas of its concepts.
        carried: As the MODEL carries them.

    Attributes:
        word_bound: Concept -> its deltas.
    """

    def __init__(self, bank: ConceptBank, strength: float, carried: Sequence[Carried] = ()) -> None:
        self.banks, seen = [(bank, strength)], set(bank.names)
        for other in reversed(carried):      # the last one that was put in goes first
            self.banks.append((_reduced(other.bank, seen), other.strength))
            seen |= set(other.bank.names)
        self.banks = [(known, factor) for known, factor in self.banks if len(known)]
        self.infos = {name: info for known, _ in self.banks for name, info in known.infos.items()}
        self.vocabulary = (self.banks[0][0].vocabulary if len(self.banks) == 1
                           else Vocabulary(self.infos.values()))
        self.word_bound: Mapping[str, Deltas] = ChainMap(      # ChainMap's stub wants mutable mappings
            *(token_lora_deltas(known, factor) for known, factor in self.banks))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.infos)

    @cached_property
    def copies(self) -> int:
        """The layer copies of their words."""
        return max((concept.tokens.copies for known, _ in self.banks for concept in known), default=1)

    def each(self, names: Collection[str]) -> Mapping[str, Deltas]:
        """Concept -> its deltas, for these prompt-activated concepts."""
        return ChainMap(*(prompt_deltas(known, [name for name in names if name in known], factor)
                          for known, factor in self.banks))  # type: ignore[arg-type]

    def deltas(self, prompt: Prompt, but: Collection[str] = ()) -> Deltas:
        """Deltas of the prompt-activated concepts in a prompt, without those in `but`."""
        return added([aggregate(None, _reduced(known, but), prompt, "sharp", factor, always_on=False).deltas
                      for known, factor in self.banks if factor])


def _reduced(bank: ConceptBank, names: Collection[str]) -> ConceptBank:
    return reduce(ConceptBank.remove, (name for name in bank.names if name in names), bank)

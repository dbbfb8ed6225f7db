"""A file to share: a bank with one concept, with metadata that model browsers show.

It is a bank file, so Load Concept Bank and `bank merge` read it. The keys `modelspec.*` (title, description,
trigger phrase, date, thumbnail, licence, author) are those of the SAI model metadata specification. Licence
and author are also stored with the concept, so they stay with it in other banks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..bank.bank import ConceptBank
from ..bank.composition import Kind
from ..bank.concepts import Concept
from ..bank.format import SUFFIX, save_bank
from ..bank.terms import Terms
from ..errors import ConceptError
from ..files import check_output
from .metadata import modelspec

KIND = "concept-bank"


def share(bank: ConceptBank, name: str, path: Path, licence: str = "", author: str = "") -> list[str]:
    """Writes one concept of a bank to a file of its own.

    Args:
        bank: The bank; it does not change.
        name: The concept.
        path: A new .safetensors file.
        licence, author: One line each; empty = what the concept states.

    Returns:
        Sentences on what the file holds.

    Raises:
        ConceptError: The concept is unknown, the file exists or cannot be written, or a line is too long.
    """
    file = check_output(path, "share file")
    if file.suffix != SUFFIX:
        raise ConceptError(f"the file '{path}' does not end in {SUFFIX}, so ComfyUI would not list it; give "
                           "it this ending")
    if file.exists():
        raise ConceptError(f"the file '{path}' exists already; choose another path")
    given = Terms(licence.strip(), author.strip())
    stored = bank[name]
    concept = replace(stored, info=replace(stored.info, terms=given.filled(stored.info.terms)))
    base = bank.layout.describe()
    usage = (f"for Continual Concepts in ComfyUI: put it into models/concept_banks and choose it in Load "
             f"Concept Bank; write {concept.info.placeholder} in prompts; made on {base}")
    alone = ConceptBank(bank.layout).add(concept)
    save_bank(alone, file, further=modelspec(concept, bank.layout, KIND, usage))
    return [f"{path} holds <{name}>, made on {base}; it goes into models/concept_banks, and Load Concept "
            "Bank reads it",
            *_terms_notes(concept.info.terms, stored.info.terms), *_notes(concept, len(bank))]


def _terms_notes(terms: Terms, before: Terms) -> list[str]:
    """What the file states, and what the bank stated in its place."""
    notes = [f"licence: {terms.licence or 'none is named, so others may not know what they may do'}"]
    notes += [f"author: {terms.author}"] if terms.author else []
    if before != terms and before.filled(terms) != terms:
        notes.append(f"the bank states something else: {before}; if it is not your own work, keep that")
    return notes


def _notes(concept: Concept, count: int) -> list[str]:
    """Other facts that a person should know before giving the file away. count: Concepts of the bank."""
    info = concept.info
    captions = len(info.provenance.captions)
    is_sum = info.composes.kind is Kind.SUM
    return [*([f"method {info.method} adds up all concepts of a bank; alone, <{concept.name}> may look "
               "different"] if is_sum and count > 1 else []),
            *(["there is no thumbnail"] if not concept.thumbnail else []),
            *([f"the file holds {captions} different captions of the photos, which others can read"]
              if captions else [])]

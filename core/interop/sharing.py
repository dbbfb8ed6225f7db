"""A file to share: a bank with one concept, with metadata that model browsers show.

It is a bank file, so Load Concept Bank and `bank merge` read it. The keys `modelspec.*` (title, description,
trigger phrase, date, thumbnail, licence, author) are those of the SAI model metadata specification. Licence
and author are also stored with the concept, so they stay with it in other banks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..bank.bank import ConceptBank
from ..bank.composition import Kind
from ..bank.concepts import Concept
from ..bank.format import SUFFIX, save_bank
from ..bank.terms import Terms
from ..errors import ConceptError
from ..files import check_output, is_device, shortened, write_new
from .metadata import modelspec

KIND = "concept-bank"
LONGEST_STEM = 200      # bytes of a file name, so that a number and an ending fit behind it


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
    write, notes = _prepared(bank, name, Terms(licence.strip(), author.strip()))
    write(file)
    return [f"{path} {notes[0]}", *notes[1:]]


def share_into(bank: ConceptBank, name: str, folder: Path, licence: str = "",
               author: str = "") -> tuple[Path, list[str]]:
    """Writes one concept to `<name>.safetensors` in a folder; a number is added where a file exists.

    Returns:
        The file, and sentences on what it holds. Arguments and errors are those of `share`.
    """
    write, notes = _prepared(bank, name, Terms(licence.strip(), author.strip()))
    stem = f"{name}_concept" if is_device(name) else shortened(name, LONGEST_STEM)
    file = write_new(folder / f"{stem}{SUFFIX}", write)
    return file, [f"{file.name} {notes[0]}", *notes[1:]]


def _prepared(bank: ConceptBank, name: str, given: Terms) -> tuple[Callable[[Path], None], list[str]]:
    """A function that writes the file, and sentences on it, the first one without its subject."""
    stored = bank[name]
    concept = replace(stored, info=replace(stored.info, terms=given.filled(stored.info.terms)))
    base = bank.layout.describe()
    usage = (f"for Continual Concepts in ComfyUI: drop it onto the page, or put it into models/concept_banks "
             f"and choose it in Load Concept Bank; write <{name}> in prompts; made on {base}")
    alone, further = ConceptBank(bank.layout).add(concept), modelspec(concept, bank.layout, KIND, usage)
    notes = [f"holds <{name}>, made on {base}; others drop it onto ComfyUI's page, or put it into "
             "models/concept_banks for Load Concept Bank",
             *_terms_notes(concept.info.terms, stored.info.terms), *_notes(concept, len(bank))]
    return lambda path: save_bank(alone, path, further=further), notes


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
            *([f"the file holds {'a caption' if captions == 1 else f'{captions} different captions'} of the "
               "photos, which others can read"] if captions else [])]

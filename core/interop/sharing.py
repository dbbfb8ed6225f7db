"""A file to share: a bank with one concept, with metadata that model browsers show.

It is a bank file, so Load Concept Bank and `bank merge` read it. The keys `modelspec.*` (title, description,
trigger phrase, date, thumbnail, licence, author) are those of the SAI model metadata specification.
"""

from __future__ import annotations

from pathlib import Path

from ..bank.bank import ConceptBank
from ..bank.composition import Kind
from ..bank.format import SUFFIX, save_bank
from ..errors import ConceptError
from ..files import check_output
from .metadata import modelspec

LONGEST = 200      # characters of a licence or an author
KIND = "concept-bank"


def _line(text: str, what: str) -> str:
    """One line of text. Raises ConceptError if it is too long or has several lines."""
    text = text.strip()
    if len(text) > LONGEST or not text.isprintable():
        raise ConceptError(f"the {what} has {len(text)} characters or several lines; allowed: one line of up "
                           f"to {LONGEST} characters")
    return text


def share(bank: ConceptBank, name: str, path: Path, licence: str = "", author: str = "") -> list[str]:
    """Writes one concept of a bank to a file of its own.

    Args:
        bank: The bank; it does not change.
        name: The concept.
        path: A new .safetensors file.
        licence, author: One line each; empty = none.

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
    licence, author = _line(licence, "licence"), _line(author, "author")
    concept = bank[name]
    is_sum = concept.info.composes.kind is Kind.SUM
    alone = ConceptBank(bank.layout).add(concept)
    base = bank.layout.describe()
    usage = (f"for Continual Concepts in ComfyUI: put it into models/concept_banks and choose it in Load "
             f"Concept Bank; write {concept.info.placeholder} in prompts; made on {base}")
    further = modelspec(concept, bank.layout, KIND, usage)
    further |= {"modelspec.license": licence} if licence else {}
    further |= {"modelspec.author": author} if author else {}
    save_bank(alone, file, further=further)
    captions = len(concept.info.provenance.captions)
    return [f"{path} holds <{name}>, made on {base}; it goes into models/concept_banks, and Load Concept "
            "Bank reads it",
            f"licence: {licence or 'none is named, so others may not know what they are allowed to do'}",
            *([f"method {concept.info.method} adds up all concepts of a bank; alone, <{name}> may look "
               "different"] if is_sum and len(bank) > 1 else []),
            *(["there is no thumbnail"] if not concept.thumbnail else []),
            *([f"the file holds {captions} different captions of the photos, which others can read"]
              if captions else [])]

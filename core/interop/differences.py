"""What differs when other programs use the files of an export, in plain words."""

from __future__ import annotations

from collections.abc import Sequence

from ..bank.composition import Kind
from ..bank.concepts import Concept
from ..model.deltas import projected
from .factors import Factors

DIFFERS = "differs in other programs: "      # begins every note on a difference


def in_other_programs(name: str, lost: Sequence[str]) -> list[str]:
    """Says whether other programs draw a concept as its bank does, and if not, why. lost: The reasons."""
    if not lost:
        return [f"other programs draw <{name}> from these files as the bank does, up to rounding"]
    return [f"{DIFFERS}{reason}" for reason in lost]


def differences(concept: Concept, of_method: int, formats: Sequence[str], factors: Factors | None,
                strength: float = 1.0, noun: str = "") -> list[str]:
    """What the files of a concept cannot hold, apart from layer copies of its words (see `refit`).

    Args:
        of_method: Number of concepts in the bank that were learned by its method.
        formats: The formats that were written.
        factors: Its deltas in the files; None if only words were written.
        strength: Factor on the deltas in the files.
        noun: The class noun, where that is the concept's words.
    """
    lost, name, tokens = [], concept.name, concept.tokens
    has_words = bool({"embedding", "bundle"} & set(formats))
    if not noun and not has_words:
        lost.append("the learned words are not in these files; export the format 'embedding' as well")
    if factors is None and projected(concept.deltas):
        lost.append("what was learned in the weights is not in this file; export a LoRA format as well")
    if concept.slots:
        lost.append(slots_note([name]))
    if factors is None:
        return lost
    lost += cut_notes(factors, "sparse deltas")
    if strength != 1:
        lost.append(f"the LoRA is written with {strength:g} times the strength")
    return lost + _composition_notes(concept, of_method) + (
        [f"the bank encodes the rest of a prompt with '{tokens.placeholder_noun}' in place of the learned "
         "words; other programs encode it with the words themselves"]
        if has_words and tokens.placeholder_noun and not noun else [])


def _composition_notes(concept: Concept, of_method: int) -> list[str]:
    """How the concept acts in its bank, where a LoRA acts in another way."""
    name, kind = concept.name, concept.info.composes.kind
    if kind is Kind.WORDS:
        return [f"<{name}> acts through its own words alone here; in other programs its LoRA acts on every "
                "word of a prompt"]
    if kind is Kind.SUM and of_method > 1:
        return [f"method {concept.info.method} adds up the deltas of all concepts; these files hold only "
                f"what <{name}> added"]
    if kind is Kind.AVERAGE and of_method > 1:
        return [f"the bank averages the predictions for its {of_method} concepts of method "
                f"{concept.info.method}; these files hold <{name}> alone"]
    return []


def cut_notes(factors: Factors, what: str) -> list[str]:
    if factors.error is None:
        return []
    return [f"{what} were cut to rank {factors.rank}, which loses {factors.error:.4f} of them (relative)"]


def slots_note(names: Sequence[str]) -> str:
    """What is lost of concepts with slots."""
    return (f"{', '.join(f'<{name}>' for name in names)}: the slots hold most of what was learned, and no "
            "other program reads slots; for other programs learn the concept with the method lora")

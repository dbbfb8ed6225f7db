"""Exports a bank for one prompt to files for other programs: one LoRA, and embeddings of the words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from ..bank.bank import ConceptBank
from ..bank.composition import Kind
from ..bank.concepts import Concept
from ..bank.hints import notes_on
from ..bank.prompts import Prompt
from ..bank.tokens import TokenGroup
from ..conditioning.routing import MODES, SiteWeights, site_weights, weighted_deltas
from ..errors import ConceptError
from ..model.backbone import Backbone
from ..model.deltas import Delta, DeltaKey, projected
from .differences import cut_notes, slots_note
from .embedding import embedding_state
from .export import (
    EXPORTING,
    check_not_only_slots,
    embedding_metadata,
    formats_of,
    lora_state,
    terms_notes,
    usage,
)
from .factors import DEFAULT_ERROR, Factors, check_strength, low_rank_sum
from .kohya import bundled_words
from .metadata import aggregate_metadata
from .refit import single_copy
from .writing import DEFAULT_FORMATS, Exported, Folders, OutputFile, check_formats, write_files

WITHOUT_BASE = ("sharp", "equal")      # modes that need no text encoder
_LONGEST = 48       # maximum bytes of concept names in a file name


@dataclass(frozen=True)
class _Named:
    """A concept in the prompt, its words with one layer copy, and notes on what was lost."""

    concept: Concept
    tokens: TokenGroup
    lost: list[str]


def export_prompt(bank: ConceptBank, prompt: str | Prompt, folder: Path | str,
                  formats: Sequence[str] = DEFAULT_FORMATS, mode: str = "sharp", strength: float = 1.0,
                  rank: int | None = None, max_error: float = DEFAULT_ERROR,
                  words_folder: Path | str | None = None, backbone: Backbone | None = None,
                  refit: bool = False) -> Exported:
    """Writes a LoRA file per format with the summed deltas for a prompt, and embeddings of its concepts.

    Existing files are never overwritten, see `export_concept`.

    Args:
        mode: As for `routing.aggregate`; paper and released need a backbone.
        strength: Factor on prompt-activated and word-bound concepts.
        rank, max_error: See `factors.low_rank_sum`.
        words_folder: Folder of embeddings; None = `folder`.
        backbone: Its text encoders encode the prompt and re-fit words.
        refit: Whether to re-fit words with layer copies, see `refit`; False uses their mean.

    Raises:
        ConceptError: Something cannot be exported or written. No files remain then.
    """
    bank.layout.refuse_joint(EXPORTING)
    strength = check_strength(strength)
    _check(bank, mode, refit, backbone)
    prompt = bank.parse(prompt)
    formats = formats_of(bank.layout, check_formats(formats), f"the prompt {prompt.text!r}")
    named = [bank.passing(name) for name in prompt.concepts]
    weights = {name: per_site
               for name, per_site in site_weights(backbone, bank, prompt, mode, strength).items()
               if any(per_site)}
    loras = [kind for kind in formats if kind != "embedding"]
    if not (weights if loras else named):
        names = ", ".join(f"<{name}>" for name in bank.names[:12]) or "none"
        raise ConceptError(f"the prompt {prompt.text!r} names no concept of the bank, so there is nothing to "
                           f"export; it holds {names}")
    owner = f"the prompt {prompt.text!r}"
    if loras:
        check_not_only_slots([bank.passing(name) for name in weights], bank.layout)
    factors = low_rank_sum(_parts(bank, weights), owner, rank, max_error) if loras else None
    if {"embedding", "bundle"} & set(formats):
        words = [_Named(concept, *single_copy(concept, backbone if refit else None)) for concept in named]
    else:
        words = [_Named(concept, concept.tokens, []) for concept in named]
    reading = f"mode {mode}, strength {strength:g}"
    outputs = [_lora(kind, bank, prompt, reading, words, factors) for kind in loras] if factors else []
    outputs += [_embedding(bank, word) for word in words] if "embedding" in formats else []
    paths = write_files(owner, outputs, Folders.of(folder, words_folder))
    notes = notes_on(bank.vocabulary, [prompt]) + _uses(prompt, loras, words, paths)
    notes += terms_notes(named)
    notes += [f"<{word.concept.name}>: {note}" for word in words for note in word.lost]
    if factors is not None:
        notes += _losses(bank, weights, prompt, mode, formats, factors)
    return Exported(paths, tuple(notes))


def _check(bank: ConceptBank, mode: str, refit: bool, backbone: Backbone | None) -> None:
    if mode not in MODES:
        raise ConceptError(f"aggregation mode is {mode!r}; allowed: {', '.join(MODES)}")
    if backbone is None and mode not in WITHOUT_BASE:
        raise ConceptError(f"aggregation mode {mode!r} reads the prompt with the base's text encoder; "
                           f"allowed without a base: {', '.join(WITHOUT_BASE)}")
    if backbone is None and refit:
        raise ConceptError("words are re-fitted with the base's text encoder; give a base, or leave refit "
                           "off")
    if backbone is not None:
        bank.check_fits(backbone.layout)


def _parts(bank: ConceptBank, weights: SiteWeights) -> dict[DeltaKey, list[tuple[float, Delta]]]:
    def load(name: str) -> Concept:
        concept = bank.passing(name)
        concept.check_fits(bank.layout)
        return replace(concept, deltas=projected(concept.deltas))

    return weighted_deltas(bank, weights, load)


def _stem(names: Sequence[str]) -> str:
    """File name such as `prompt_rex_mimi`, with a count instead of names that do not fit."""
    stem = "prompt"
    for i, name in enumerate(names):
        if len(f"{stem}_{name}".encode()) > _LONGEST:
            return f"{stem}_and_{len(names) - i}_more"
        stem = f"{stem}_{name}"
    return stem


def _lora(kind: str, bank: ConceptBank, prompt: Prompt, reading: str, words: Sequence[_Named],
          factors: Factors) -> OutputFile:
    state: dict[str, Tensor] = lora_state(kind, bank.layout, factors)
    for word in words if kind == "bundle" else ():
        state |= bundled_words(word.concept.name, word.tokens)
    stem = _stem([word.concept.name for word in words])

    def metadata(path: Path) -> dict[str, str]:
        hint = f"made for the prompt {prompt.text!r}; it acts on every prompt"
        return aggregate_metadata(stem, prompt.text, reading, [word.concept for word in words], bank.layout,
                                  state, hint)

    return OutputFile(stem, kind, state, metadata)


def _embedding(bank: ConceptBank, word: _Named) -> OutputFile:
    metadata = partial(embedding_metadata, word.concept, bank.layout)
    return OutputFile(word.concept.name, "embedding", embedding_state(word.tokens), metadata)


def _uses(prompt: Prompt, loras: Sequence[str], words: Sequence[_Named], paths: Sequence[Path]) -> list[str]:
    lora_paths = paths[:len(loras)]
    word_paths = dict(zip((word.concept.name for word in words), paths[len(loras):], strict=False))
    notes = [f"{path.name}: LoRA for this one prompt; it acts on every prompt that it is loaded for"
             for path in lora_paths]
    notes += [f"{path.name}: {usage('embedding', path, name)}" for name, path in word_paths.items()]
    if word_paths and all(name in word_paths for name in prompt.placeholders):
        typed = prompt.substituted(lambda name: f" embedding:{word_paths[name].stem} ")
        notes.append(f"in ComfyUI the prompt is then: {' '.join(typed.split())}")
    return notes


def _losses(bank: ConceptBank, weights: Mapping, prompt: Prompt, mode: str, formats: Sequence[str],
            factors: Factors) -> list[str]:
    """Notes on what these files cannot represent."""
    notes = cut_notes(factors, "deltas")
    if not {"embedding", "bundle"} & set(formats):
        notes.append("the learned words are not in these files; export the format 'embedding' as well")
    if mode != "sharp":
        notes.append(f"mode {mode} computes new weights for every prompt; these files hold the weights for "
                     f"{prompt.text!r}")
    by_composition: dict[Kind, list[str]] = {}
    for name in weights:
        by_composition.setdefault(bank.infos[name].composes.kind, []).append(f"<{name}>")
    if word_bound := by_composition.get(Kind.WORDS):
        notes.append(f"{', '.join(word_bound)}: in the bank each acts through its own words alone; in other "
                     "programs the LoRA acts on every word of a prompt, and the concepts act on each other's "
                     "words")
    if slotted := [name for name in weights if bank[name].slots]:
        notes.append(slots_note(slotted))
    if always_on := by_composition.get(Kind.SUM):
        notes.append(f"{', '.join(always_on)}: always on, whatever the prompt says; their deltas are in "
                     "these files too")
    if average := by_composition.get(Kind.AVERAGE):
        notes.append(f"{', '.join(average)}: the bank averages predictions; these files hold the average of "
                     "the weights, which is similar but not the same")
    return notes

"""What a bank gives for one prompt, as files that other programs read: one LoRA, and the words of the concepts that the prompt names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from ..bank.bank import ConceptBank
from ..bank.composition import Kind
from ..bank.concepts import Concept
from ..bank.prompts import Prompt
from ..bank.tokens import TokenGroup
from ..conditioning.routing import MODES, site_weights
from ..errors import ConceptError
from ..model.backbone import Backbone
from ..model.deltas import Delta, DeltaKey
from .embedding import embedding_state
from .export import cut_notes, embedding_metadata, lora_state, usage
from .factors import DEFAULT_ERROR, Factors, check_strength, low_rank_sum
from .kohya import bundled_words
from .metadata import aggregate_metadata
from .refit import single_copy
from .writing import DEFAULT_FORMATS, Exported, Folders, Piece, check_formats, write_pieces

WITHOUT_BASE = ("sharp", "equal")      # modes that need no text encoder
_LONGEST = 48       # bytes of names in a file's name


@dataclass(frozen=True)
class _Named:
    """A concept that the prompt names, its words with one copy, and what that lost."""

    concept: Concept
    tokens: TokenGroup
    lost: list[str]


def export_prompt(bank: ConceptBank, prompt: str | Prompt, folder: Path | str, formats: Sequence[str] = DEFAULT_FORMATS,
                  mode: str = "sharp", strength: float = 1.0, rank: int | None = None, max_error: float = DEFAULT_ERROR,
                  words_folder: Path | str | None = None, backbone: Backbone | None = None, refit: bool = False) -> Exported:
    """Writes the deltas that the bank gives for a prompt (an aggregate) as one LoRA file per format, and the words of each concept that the
    prompt names as an embedding.

    mode: as for `routing.aggregate`; paper and released need a backbone, whose text encoders read the prompt. strength: factor on routed
    concepts. rank: without it sums of low-rank deltas are exact; with it they are cut to it, see `factors.low_rank_sum`. refit: words with
    layer copies are re-fitted to the backbone's text encoders. Otherwise as `export_concept`: nothing is overwritten, ConceptError leaves
    no file.
    """
    formats, strength = check_formats(formats), check_strength(strength)
    _check(bank, mode, refit, backbone)
    prompt = bank.parse(prompt)
    named = [bank.passing(name) for name in prompt.concepts]
    weights = site_weights(backbone, bank, prompt, mode, strength)
    weights = {name: per_site for name, per_site in weights.items() if any(per_site)}
    loras = [kind for kind in formats if kind != "embedding"]
    if not (weights if loras else named):
        known = ", ".join(f"<{name}>" for name in bank.names[:12]) or "none"
        raise ConceptError(f"the prompt {prompt.text!r} names no concept of the bank, so there is nothing to export; it holds {known}")
    factors = low_rank_sum(_parts(bank, weights), f"the prompt {prompt.text!r}", rank, max_error) if loras else None
    wants_words = {"embedding", "bundle"} & set(formats)
    words = [_Named(concept, *(single_copy(concept, backbone if refit else None) if wants_words else (concept.tokens, [])))
             for concept in named]
    reading = f"mode {mode}, strength {strength:g}"
    pieces = [_lora(kind, bank, prompt, reading, words, factors) for kind in loras]
    pieces += [_embedding(bank, one) for one in words] if "embedding" in formats else []
    paths = write_pieces(f"the prompt {prompt.text!r}", pieces, Folders.of(folder, words_folder))
    notes = _uses(prompt, loras, words, paths) + [f"<{one.concept.name}>: {note}" for one in words for note in one.lost]
    return Exported(paths, (*notes, *(_losses(bank, weights, prompt, mode, formats, factors) if loras else ())))


def _check(bank: ConceptBank, mode: str, refit: bool, backbone: Backbone | None) -> None:
    if mode not in MODES:
        raise ConceptError(f"aggregation mode is {mode!r}; allowed: {', '.join(MODES)}")
    if backbone is None and mode not in WITHOUT_BASE:
        raise ConceptError(f"aggregation mode {mode!r} reads the prompt with the base's text encoder; allowed without a base: "
                           f"{', '.join(WITHOUT_BASE)}")
    if backbone is None and refit:
        raise ConceptError("words are re-fitted with the base's text encoder; give a base, or leave refit off")
    if backbone is not None:
        bank.check_fits(backbone.layout)


def _parts(bank: ConceptBank, weights: Mapping[str, list[float]]) -> dict[DeltaKey, list[tuple[float, Delta]]]:
    parts: dict[DeltaKey, list[tuple[float, Delta]]] = {}
    for name, per_site in weights.items():
        concept = bank.passing(name)
        concept.check_fits(bank.layout)
        for key, delta in concept.deltas.items():
            if per_site[key[0]]:
                parts.setdefault(key, []).append((per_site[key[0]], delta))
    return parts


def _stem(names: Sequence[str]) -> str:
    """`prompt_rex_mimi`, with a count in place of names for which there is no room."""
    stem = "prompt"
    for i, name in enumerate(names):
        if len(f"{stem}_{name}".encode()) > _LONGEST:
            return f"{stem}_and_{len(names) - i}_more"
        stem = f"{stem}_{name}"
    return stem


def _lora(kind: str, bank: ConceptBank, prompt: Prompt, reading: str, words: Sequence[_Named], factors: Factors) -> Piece:
    state: dict[str, Tensor] = lora_state(kind, bank.layout, factors)
    for one in words if kind == "bundle" else ():
        state |= bundled_words(one.concept.name, one.tokens)
    stem = _stem([one.concept.name for one in words])

    def metadata(path: Path) -> dict[str, str]:
        hint = f"made for the prompt {prompt.text!r}; it acts on every prompt"
        return aggregate_metadata(stem, prompt.text, reading, [one.concept for one in words], bank.layout, state, hint)

    return Piece(stem, kind, state, metadata)


def _embedding(bank: ConceptBank, one: _Named) -> Piece:
    return Piece(one.concept.name, "embedding", embedding_state(one.tokens), partial(embedding_metadata, one.concept, bank.layout))


def _uses(prompt: Prompt, loras: Sequence[str], words: Sequence[_Named], paths: Sequence[Path]) -> list[str]:
    lora_paths, word_paths = paths[:len(loras)], dict(zip((one.concept.name for one in words), paths[len(loras):], strict=False))
    notes = [f"{path.name}: LoRA for this one prompt; it acts on every prompt that it is loaded for" for path in lora_paths]
    notes += [f"{path.name}: {usage('embedding', path, name)}" for name, path in word_paths.items()]
    if word_paths and all(name in word_paths for name in prompt.placeholders):
        typed = prompt.substituted(lambda name: f" embedding:{word_paths[name].stem} ")
        notes.append(f"in ComfyUI the prompt is then: {' '.join(typed.split())}")
    return notes


def _losses(bank: ConceptBank, weights: Mapping, prompt: Prompt, mode: str, formats: Sequence[str], factors: Factors) -> list[str]:
    """What these files cannot hold."""
    notes = cut_notes(factors, "deltas")
    if not {"embedding", "bundle"} & set(formats):
        notes.append("the learned words are not in these files; export the format 'embedding' as well")
    if mode != "sharp":
        notes.append(f"mode {mode} weighs concepts anew for every prompt; these files hold its weights for {prompt.text!r}")
    by_composition: dict[Kind, list[str]] = {}
    for name in weights:
        by_composition.setdefault(bank.infos[name].composes.kind, []).append(f"<{name}>")
    if bound := by_composition.get(Kind.WORDS):
        notes.append(f"{', '.join(bound)}: in the bank each acts through its own words alone; in other programs the LoRA acts on every "
                     "word of a prompt, and the concepts act on each other's words")
    if standing := by_composition.get(Kind.SUM):
        notes.append(f"{', '.join(standing)}: on whatever the prompt says, so their deltas are in these files too")
    if average := by_composition.get(Kind.AVERAGE):
        notes.append(f"{', '.join(average)}: the bank averages predictions; these files hold the average of the weights, which is near it")
    return notes

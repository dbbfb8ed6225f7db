"""Exports one or all concepts of a bank to files for other programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from ..bank.bank import ConceptBank
from ..bank.concepts import Concept
from ..bank.tokens import TokenGroup
from ..errors import ConceptError
from ..model.backbone import Backbone
from ..model.deltas import projected
from ..model.sites import SiteLayout
from .differences import differences, in_other_programs
from .diffusers_lora import diffusers_state
from .embedding import embedding_state
from .factors import DEFAULT_ERROR, DEFAULT_RANK, Factors, check_strength, low_rank
from .kohya import bundled_words, kohya_state
from .metadata import kohya_metadata, modelspec, thumbnail_type
from .refit import single_copy
from .writing import DEFAULT_FORMATS, FORMATS, Exported, Folders, OutputFile, check_formats, write_files

EXPORTING = "writing files for other programs is"      # what joint attention does not support

__all__ = ["DEFAULT_FORMATS", "FORMATS", "Exported", "export_bank", "export_concept"]


def export_concept(bank: ConceptBank, name: str, folder: Path | str, formats: Sequence[str] = DEFAULT_FORMATS,
                   strength: float = 1.0, rank: int = DEFAULT_RANK, max_error: float = DEFAULT_ERROR,
                   words_folder: Path | str | None = None, refit: Backbone | None = None) -> Exported:
    """Writes a concept of the bank into `folder`, one file per format, named after the concept.

    Existing files are never overwritten. Instead, a counter such as `_00002` is appended to the name, the
    same for all files of a call.

    Args:
        formats: kohya (LoRA), bundle (LoRA and words in one file), diffusers (LoRA), embedding (words).
        strength: Factor on the deltas.
        rank, max_error: Limits for sparse deltas, see `factors.low_rank`.
        words_folder: Folder of embeddings; None = `folder`.
        refit: A base; words with layer copies are re-fitted with its text encoders, see `refit`.

    Raises:
        ConceptError: Something cannot be exported or written. No files remain then.
    """
    bank.layout.refuse_joint(EXPORTING)
    strength, concept = check_strength(strength), bank.passing(name)
    formats = formats_of(bank.layout, check_formats(formats), f"concept '{concept.name}'")
    concept.check_fits(bank.layout)
    owner, factors = f"concept '{concept.name}'", None
    tokens, lost = concept.tokens, list[str]()
    if formats != ("embedding",):
        check_not_only_slots([concept], bank.layout)
        factors = low_rank(projected(concept.deltas), owner, rank, max_error)
    if {"embedding", "bundle"} & set(formats):
        tokens, lost = single_copy(concept, refit)
    states = {kind: _state(kind, concept.name, tokens, bank.layout, factors, strength) for kind in formats}
    outputs = [OutputFile(concept.name, kind, state, partial(_metadata, kind, concept, bank.layout, state))
              for kind, state in states.items()]
    paths = write_files(owner, outputs, Folders.of(folder, words_folder))
    noun = "" if bank.layout.takes_words else concept.info.class_noun
    notes = [f"{path.name}: {usage(kind, path, concept.name, noun)}"
             for kind, path in zip(formats, paths, strict=True)]
    of_method = sum(info.method == concept.info.method for info in bank.infos.values())
    lost += differences(concept, of_method, formats, factors, strength, noun)
    notes += [*terms_notes([concept]), *in_other_programs(concept.name, lost)]
    if concept.thumbnail and thumbnail_type(concept.thumbnail) is None:
        notes.append("the thumbnail is no JPEG or PNG of up to 1 MB and was left out")
    return Exported(paths, tuple(notes))


def formats_of(layout: SiteLayout, formats: tuple[str, ...], owner: str) -> tuple[str, ...]:
    """The formats to write: none with words where words are class nouns.

    Raises:
        ConceptError: No format is left.
    """
    if layout.takes_words:
        return formats
    kept = tuple(dict.fromkeys("kohya" if kind == "bundle" else kind
                               for kind in formats if kind != "embedding"))
    if not kept:
        raise ConceptError(f"the words of {owner} are class nouns on this base, so there is no embedding to "
                           "write; allowed: the LoRA formats")
    return kept


def export_bank(bank: ConceptBank, folder: Path | str, formats: Sequence[str] = DEFAULT_FORMATS,
                strength: float = 1.0, rank: int = DEFAULT_RANK, max_error: float = DEFAULT_ERROR,
                words_folder: Path | str | None = None, refit: Backbone | None = None) -> Exported:
    """Writes every concept as `export_concept` does.

    Concepts that cannot be exported are reported in the notes and skipped.

    Raises:
        ConceptError: No concept can be exported.
    """
    bank.layout.refuse_joint(EXPORTING)
    formats, strength = check_formats(formats), check_strength(strength)
    if not len(bank):
        raise ConceptError("the bank holds no concept to export")
    files: list[Path] = []
    names_by_note: dict[str, list[str]] = {}      # do not repeat a note that several concepts share
    failed: dict[str, str] = {}
    for name in bank.names:
        try:
            done = export_concept(bank, name, folder, formats, strength, rank, max_error, words_folder, refit)
        except ConceptError as error:
            failed[name] = str(error)
            continue
        files += done.files
        for note in done.notes:
            names_by_note.setdefault(note, []).append(name)
    if not files:
        raise ConceptError(f"none of the {len(bank)} concepts could be exported; the first one: "
                           f"{next(iter(failed.values()))}")
    notes = [f"{', '.join(f'<{name}>' for name in names)}: {note}" for note, names in names_by_note.items()]
    notes += [f"<{name}> was left out: {reason}" for name, reason in failed.items()]
    return Exported(tuple(files), tuple(notes))


def _state(kind: str, name: str, tokens: TokenGroup, layout: SiteLayout, factors: Factors | None,
           strength: float) -> dict[str, Tensor]:
    if kind == "embedding" or factors is None:      # all other kinds have factors
        return embedding_state(tokens)
    words = bundled_words(name, tokens) if kind == "bundle" else {}
    return lora_state(kind, layout, factors, strength) | words


def lora_state(kind: str, layout: SiteLayout, factors: Factors, strength: float = 1.0) -> dict[str, Tensor]:
    return (diffusers_state if kind == "diffusers" else kohya_state)(layout, factors.deltas, strength)


def _metadata(kind: str, concept: Concept, layout: SiteLayout, state: Mapping[str, Tensor],
              path: Path) -> dict[str, str]:
    spec_kind = "textual-inversion" if kind == "embedding" else "lora"
    common = modelspec(concept, layout, spec_kind, usage(kind, path, concept.name))
    return common | (kohya_metadata(concept.info, layout, state) if kind in ("kohya", "bundle") else {})


def embedding_metadata(concept: Concept, layout: SiteLayout, path: Path) -> dict[str, str]:
    return _metadata("embedding", concept, layout, {}, path)


def usage(kind: str, path: Path, name: str, noun: str = "") -> str:
    """One sentence on how to use a concept's file. noun: the class noun, if that is the concept's words."""
    if noun:
        return f"LoRA; write '{noun}' where the concept is meant; it acts on every prompt"
    if kind == "embedding":
        return (f"goes into the embeddings folder; write embedding:{path.stem} in prompts, with a space "
                "before and after it")
    if kind == "diffusers":
        return ("for load_lora_weights of diffusers; the words: load_textual_inversion with the embedding "
                f"file and token='<{name}>'")
    if kind == "bundle":
        return (f"LoRA and words in one file: A1111 reads both, the word is {name}; ComfyUI's LoRA loader "
                "leaves the words out and logs 'lora key not loaded' for them")
    return "LoRA without the words, which are in the embedding file; it acts on every prompt"


def terms_notes(concepts: Sequence[Concept]) -> list[str]:
    """What the authors of the concepts state, which the metadata of the files repeats."""
    return [f"{concept.info.placeholder}: {concept.info.terms}" for concept in concepts if concept.info.terms]


def check_not_only_slots(concepts: Sequence[Concept], layout: SiteLayout) -> None:
    """Raises ConceptError if all concepts have slots and nothing else, so that a LoRA file would be empty."""
    if concepts and all(concept.slots and not projected(concept.deltas) for concept in concepts):
        instead = "; allowed: the format 'embedding'" if layout.takes_words else ""
        raise ConceptError(f"concept '{concepts[0].name}' was learned as slots, which no other program "
                           "reads; for a LoRA file learn it with the method lora (--for-other-programs, or "
                           f"'readable by' in Concept Learner){instead}")

"""Imports files of other programs as concepts: LoRA in several forms and names, and embeddings.

Only the text cross-attention of a LoRA is imported, because concepts have deltas nowhere else. It is imported
exactly, whatever its form, see `lora_forms`; other changes are counted and reported. A LoRA without learned
words gets the vocabulary's vectors of its trigger words. Files are untrusted: anything invalid is rejected
with a one-sentence error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..bank.concepts import Concept, ConceptInfo, Provenance
from ..bank.grammar import PLACEHOLDER, check_letters
from ..bank.terms import Terms, joined
from ..bank.tokens import TokenGroup, check_class_noun, check_name, default_words
from ..errors import ConceptError
from ..model.backbone import Backbone, TextEncoder
from ..model.deltas import LowRankDelta
from ..model.sites import SiteLayout
from .embedding_file import counted, embedding_vectors, read_embedding
from .factors import compact
from .lora_deltas import Taken, lora_deltas
from .lora_file import LoraFile, chosen, read_lora, read_tensors
from .lora_names import LORA, shown

# Not a training method. Imported concepts are prompt-activated and act on all words of the prompt, like a
# LoRA.
METHOD = "imported"


def trigger_vectors(encoders: Iterable[TextEncoder], trigger: str) -> dict[str, Tensor]:
    """Text encoder -> the vocabulary's vectors of a LoRA's trigger words, `[n, D]`.

    Raises:
        ConceptError: They are longer than a concept can be, or name a concept, which has no vectors there.
    """
    placeholder = PLACEHOLDER.search(check_letters(trigger, "the trigger"))
    if placeholder:
        raise ConceptError(f"the trigger {trigger!r} holds the placeholder {placeholder[0]}, which the text "
                           "encoder does not know; give the plain words that are typed for the LoRA")
    return counted({encoder.name: encoder.vectors(encoder.ids(trigger)) for encoder in encoders},
                   f"the trigger {trigger!r}")


@dataclass(frozen=True)
class Imported:
    """An imported concept. notes: sentences on imported and omitted parts."""

    concept: Concept
    notes: tuple[str, ...]


def imported(name: str, class_noun: str, kind: str, layout: SiteLayout, vectors: Mapping[str, Tensor],
             taken: Taken | None = None, files: tuple[str, ...] = (), base: str = "") -> Imported:
    """Builds the concept.

    Args:
        vectors: Text encoder -> vectors of its words, `[n, D]`.
        taken: Its deltas; None for an embedding only.
        files: File names, for the provenance.
        base: Fingerprint of the base that the deltas were computed from; "" if they fit all of its family.
    """
    words = default_words(name, len(next(iter(vectors.values()))))
    tokens = TokenGroup(words, {encoder: compact(vector, f"{encoder} of {name}").unsqueeze(0)
                                for encoder, vector in vectors.items()},
                        "" if layout.takes_words else class_noun)
    deltas = {} if taken is None else _one_rank(taken.deltas)
    origin = Provenance(base, settings={"files": list(files)})
    info = ConceptInfo(name, class_noun, METHOD, words, kind, origin)
    concept = Concept(info, tokens, deltas)
    concept.check_fits(layout)
    acting = "" if taken is None else "; it acts on all words of a prompt that names it, as a LoRA does"
    stands_for = (f"{len(words)} learned word{'s' * (len(words) > 1)}" if layout.takes_words
                  else f"'{class_noun}' in prompts")
    notes = [f"<{name}> stands for {stands_for}{acting}"]
    if taken is not None:
        notes += taken.notes()
        if set(taken.forms) - {LORA}:
            rank = max(delta.down.shape[0] for delta in deltas.values())
            notes.append(f"the changes are kept exactly, as deltas of up to rank {rank}; the concept takes "
                         f"{concept.nbytes() / 1e6:.1f} MB")
    return Imported(concept, tuple(notes))


def _one_rank(deltas: Mapping) -> dict:
    """Pads factors with zeros to one rank per projection, as a bank requires, and rounds them to float16
    where it holds them.
    """
    ranks: dict[str, int] = {}
    for (_, projection), delta in deltas.items():
        ranks[projection] = max(ranks.get(projection, 0), delta.down.shape[0])
    pad, padded = torch.nn.functional.pad, {}
    for (index, projection), delta in deltas.items():
        missing, where = ranks[projection] - delta.down.shape[0], f"{projection} of site {index}"
        padded[index, projection] = LowRankDelta(pad(compact(delta.up, where), (0, missing)),
                                                 pad(compact(delta.down, where), (0, 0, 0, missing)),
                                                 delta.scale)
    return padded


@dataclass(frozen=True)
class Sources:
    """What was read to make a concept. files: their names, the LoRA's first; terms: what they state."""

    files: tuple[str, ...]
    lora: LoraFile | None = None
    embedding: Mapping[str, Tensor] | None = None
    terms: Terms = Terms()


def read_sources(lora: Path | str | None, embedding: Path | str | None, which: str = "") -> Sources:
    """Reads the files of an import. Needs no base.

    Raises:
        ConceptError: There is no file, one cannot be read, or `which` names something that is not there.
    """
    files = tuple(Path(path).name for path in (lora, embedding) if path is not None)
    if not files:
        raise ConceptError("there is nothing to import; give a LoRA file, an embedding file or both")
    read = None if lora is None else read_lora(lora, which)
    tensors = None if embedding is None else read_embedding(embedding)
    names = set(tensors or ())
    if read is not None:
        names |= {*read.adapters, *read.folders, *read.embeddings}
    unknown = {choice.strip() for choice in which.split(",")} - names - {""}
    if unknown:
        allowed = ", ".join(map(shown, sorted(names - {""})[:8])) or "nothing to choose from"
        raise ConceptError(f"{' and '.join(files)} holds no {min(unknown)!r}; allowed: {allowed}")
    stated = {} if read is None else {"LoRA": read.terms}
    if embedding is not None:
        stated["embedding"] = Terms.from_metadata(read_tensors(Path(embedding), lambda name: False)[2])
    return Sources(files, read, tensors, joined(stated))


def import_concept(name: str, class_noun: str, kind: str, layout: SiteLayout,
                   encoders: Iterable[TextEncoder] = (), lora: Path | str | None = None,
                   embedding: Path | str | None = None, trigger: str = "", which: str = "",
                   backbone: Backbone | None = None) -> Imported:
    """Makes a concept from a LoRA file, an embedding file or both.

    Args:
        encoders: A backbone's text encoders, for `trigger`.
        trigger: Trigger words of a LoRA without learned words.
        which: The adapter or embedding to take from a file with several; one of each with a comma.
        backbone: The base. DoRA and Custom Diffusion's files need its weights.

    Raises:
        ConceptError: A file cannot be read or does not fit, or there are no words for the concept.
    """
    check_name(name)
    class_noun = check_class_noun(class_noun)
    return concept_of(name, class_noun, kind, layout, encoders, read_sources(lora, embedding, which), trigger,
                      which, backbone)


def concept_of(name: str, class_noun: str, kind: str, layout: SiteLayout, encoders: Iterable[TextEncoder],
               sources: Sources, trigger: str = "", which: str = "",
               backbone: Backbone | None = None) -> Imported:
    """Makes a concept from files that were read, see `import_concept`."""
    layout.refuse_joint("importing files is")
    taken: Taken | None = None
    vectors: dict[str, Tensor] | None = None
    notes: list[str] = []
    if sources.lora is not None:
        owner, file = f"the LoRA '{sources.files[0]}'", sources.lora
        taken = lora_deltas(file, layout, owner, which, backbone)
        if file.embeddings and sources.embedding is None:
            bundled = chosen(file.embeddings, which, owner, "embeddings")
            vectors, notes = embedding_vectors(file.embeddings[bundled], layout, owner, which)
        elif file.embeddings:
            notes.append("left out: the words in the LoRA; those of the embedding file were taken")
    if sources.embedding is not None:
        owner = f"the embedding '{sources.files[-1]}'"
        vectors, more = embedding_vectors(sources.embedding, layout, owner, which)
        notes += more
    if not layout.takes_words:      # prompts are encoded with the trigger, as they are for the LoRA alone
        class_noun, trigger = check_class_noun(trigger) or class_noun, ""
        vectors = {encoder: vector[-1:] for encoder, vector in trigger_vectors(encoders, class_noun).items()}
    elif vectors is not None and trigger.strip():
        notes.append("the trigger was not used, because the file brings its own words")
    elif trigger.strip():
        vectors = trigger_vectors(encoders, trigger.strip())
    if vectors is None:
        raise ConceptError(f"the LoRA '{sources.files[0]}' has no learned words; give the trigger words that "
                           "are typed for it, or an embedding file")
    base = backbone.fingerprint if taken is not None and taken.used_base and backbone is not None else ""
    result = imported(name, class_noun, kind, layout, vectors, taken, sources.files, base)
    if sources.terms:
        notes.append(f"kept with the concept: {sources.terms}")
    concept = replace(result.concept, info=replace(result.concept.info, terms=sources.terms))
    return Imported(concept, (*result.notes, *notes))

"""Imports files of other programs as concepts: LoRA (kohya's, diffusers', PEFT's names) and embeddings.

Only the text cross-attention of a LoRA is imported, because concepts have deltas nowhere else. Other changes
of the LoRA are counted and reported. A LoRA without learned words gets the vocabulary's vectors of its
trigger words. Files are untrusted: only safetensors are read, and anything invalid is rejected with a
one-sentence error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..bank.concepts import Concept, ConceptInfo, Provenance
from ..bank.tokens import MAX_WORDS, TokenGroup, check_class_noun, check_name, default_words
from ..errors import ConceptError
from ..model.backbone import TextEncoder
from ..model.deltas import DeltaKey, LowRankDelta
from ..model.sites import Site, SiteLayout
from .lora_names import part_of, site_names

# Not a training method. Imported concepts are prompt-activated and act on all words of the prompt, like a
# LoRA.
METHOD = "imported"
MOST_RANK = 1024
LARGEST_EMBEDDING = 16 << 20      # bytes
_BUNDLE = "bundle_emb."
_ENCODERS = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}      # diffusers' training keys
_ODD = "in a form other than plain LoRA"


@dataclass(frozen=True)
class LoraFile:
    """tensors: LoRA factors and bundled words; others: names of ignored tensors."""

    tensors: Mapping[str, Tensor]
    others: tuple[str, ...] = ()

    @property
    def words(self) -> dict[str, Tensor]:
        """Learned words in the file: text encoder (or its key in the file) -> vectors."""
        return {key.removeprefix(_BUNDLE).split(".", 1)[-1]: t for key, t in self.tensors.items()
                if key.startswith(_BUNDLE)}


def _read(path: Path | str, wanted: Callable[[str], bool]) -> LoraFile:
    path = Path(path)
    if not path.is_file():
        raise ConceptError(f"there is no file '{path}'")
    if path.suffix != ".safetensors":
        raise ConceptError(f"'{path.name}' is a {path.suffix or 'nameless'} file; allowed: .safetensors "
                           "(others can run code when opened)")
    try:
        with safe_open(str(path), framework="pt") as file:
            keys = list(file.keys())
            tensors = {key: file.get_tensor(key) for key in keys if wanted(key)}
            return LoraFile(tensors, tuple(key for key in keys if key not in tensors))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ConceptError(f"'{path.name}' is not a readable .safetensors file ({error})") from error


def read_lora(path: Path | str) -> LoraFile:
    """Reads a LoRA. Raises ConceptError for anything but a `.safetensors` file."""
    return _read(path, lambda key: key.startswith(_BUNDLE) or part_of(key) is not None)


def read_embedding(path: Path | str) -> Mapping[str, Tensor]:
    """Reads all tensors of a small `.safetensors` file. Raises ConceptError for anything else."""
    path = Path(path)
    if path.is_file() and path.stat().st_size > LARGEST_EMBEDDING:
        raise ConceptError(f"'{path.name}' is larger than {LARGEST_EMBEDDING >> 20} MB; an embedding is a "
                           "few hundred kilobytes")
    return _read(path, lambda key: True).tensors


@dataclass(frozen=True)
class Taken:
    """The imported part of a LoRA.

    Args:
        deltas: Deltas of the sites.
        share: Their share of the LoRA's squared Frobenius norm, 0 to 1.
        left: Part of the model -> number of its modules that were left out.
    """

    deltas: Mapping[DeltaKey, LowRankDelta]
    share: float
    left: Mapping[str, int]


def lora_deltas(file: LoraFile, layout: SiteLayout, owner: str) -> Taken:
    """Extracts the text cross-attention of a LoRA.

    Raises:
        ConceptError: The LoRA has none, is damaged, or belongs to another model family.
    """
    modules: dict[tuple[bool, str], dict[str, Tensor]] = {}
    for key, tensor in file.tensors.items():
        part = part_of(key)
        if part is not None:
            modules.setdefault((part.is_text, part.module), {})[part.side] = tensor
    names, deltas, inside, outside = site_names(layout), {}, 0.0, 0.0
    left = Counter({_ODD: len({key.rsplit(".", 1)[0] for key in file.others})})
    for (is_text, module), sides in modules.items():
        if "up" not in sides or "down" not in sides or "mid" in sides:
            left[_ODD] += 1
            continue
        place, delta = None if is_text else names.get(module), _delta(sides, f"{owner}: {module}")
        if place is None:
            left["of the text encoder" if is_text else "of other layers of the UNet"] += 1
            outside += _energy(delta)
            continue
        deltas[place] = _fitting(delta, layout.sites[place[0]], place[1], owner)
        inside += _energy(delta)
    if not deltas:
        raise ConceptError(f"{owner} changes no text cross-attention of this base ({layout.describe()}); "
                           "allowed: LoRA files with attn2 layers for it")
    return Taken(deltas, inside / (inside + outside) if inside + outside > 0 else 1.0, left)


def _delta(sides: Mapping[str, Tensor], owner: str) -> LowRankDelta:
    up, down, alpha = sides["up"], sides["down"], sides.get("alpha")
    are_matrices = all(t.dtype.is_floating_point and t.ndim in (2, 4) and t.numel() for t in (up, down))
    if not are_matrices or (alpha is not None and alpha.numel() != 1):
        raise ConceptError(f"{owner} has factors of shape {tuple(up.shape)} and {tuple(down.shape)}; "
                           "allowed: two matrices")
    up, down = (t.flatten(1).float() for t in (up, down))
    rank = down.shape[0]
    if up.shape[1] != rank or rank > MOST_RANK:
        raise ConceptError(f"{owner} has ranks {up.shape[1]} and {rank}; allowed: the same on both sides, up "
                           f"to {MOST_RANK}")
    scale = 1.0 if alpha is None else float(alpha) / rank
    # a scale of NaN fails this comparison too
    if not (torch.isfinite(up).all() and torch.isfinite(down).all() and abs(scale) < 1e4):
        raise ConceptError(f"{owner} holds NaN, infinity or a scale of {scale:g}; allowed: finite numbers")
    return LowRankDelta(up, down, scale)


def _fitting(delta: LowRankDelta, site: Site, projection: str, owner: str) -> LowRankDelta:
    if delta.shape != site.shape(projection):
        has, needs = ("x".join(map(str, shape)) for shape in (delta.shape, site.shape(projection)))
        raise ConceptError(f"{owner} has a {has} change for {projection} of site {site.index}; this base "
                           f"needs {needs}: it was made for another family of models")
    return delta


def _energy(delta: LowRankDelta) -> float:
    """Squared Frobenius norm, computed from `r x r` matrices."""
    product = (delta.up.T @ delta.up).double() * (delta.down @ delta.down.T).double()
    return delta.scale**2 * float(product.sum().clamp(min=0))


def embedding_vectors(tensors: Mapping[str, Tensor], layout: SiteLayout, owner: str) -> dict[str, Tensor]:
    """Text encoder -> vectors of the words, `[n, D]`.

    Args:
        tensors: With keys clip_l and clip_g, or diffusers' text_encoders_0 and _1. For one encoder, any
            single tensor.
    """
    widths = dict(layout.text_widths)
    named = {_ENCODERS.get(key, key): tensor for key, tensor in tensors.items()}
    if not set(widths) <= set(named):
        if len(widths) > 1 or len(tensors) != 1:
            raise ConceptError(f"{owner} holds {', '.join(sorted(tensors)[:6]) or 'nothing'}; allowed: "
                               f"vectors for {', '.join(widths)}")
        named = {next(iter(widths)): next(iter(tensors.values()))}
    vectors = {}
    for encoder, width in widths.items():
        tensor = named[encoder]
        fits = tensor.dtype.is_floating_point and tensor.ndim in (1, 2) and tensor.shape[-1] == width
        if not fits or not torch.isfinite(tensor).all():
            raise ConceptError(f"{owner} has vectors of shape {tuple(tensor.shape)} for '{encoder}'; "
                               f"allowed: finite numbers [n, {width}]")
        vectors[encoder] = tensor.float().view(-1, width)
    return _counted(vectors, owner)


def trigger_vectors(encoders: Iterable[TextEncoder], trigger: str) -> dict[str, Tensor]:
    """Text encoder -> the vocabulary's vectors of a LoRA's trigger words, `[n, D]`."""
    return _counted({encoder.name: encoder.vectors(encoder.ids(trigger)) for encoder in encoders},
                    f"the trigger {trigger!r}")


def _counted(vectors: dict[str, Tensor], owner: str) -> dict[str, Tensor]:
    counts = sorted({len(vector) for vector in vectors.values()})
    if len(counts) != 1 or not 1 <= counts[0] <= MAX_WORDS:
        listed = " and ".join(map(str, counts))
        raise ConceptError(f"{owner} has {listed} vectors; allowed: 1 to {MAX_WORDS}, as many for each text "
                           "encoder")
    return vectors


@dataclass(frozen=True)
class Imported:
    """An imported concept. notes: sentences on imported and omitted parts."""

    concept: Concept
    notes: tuple[str, ...]


def imported(name: str, class_noun: str, kind: str, layout: SiteLayout, vectors: Mapping[str, Tensor],
             taken: Taken | None = None,
             files: tuple[str, ...] = ()) -> Imported:
    """Builds the concept.

    Args:
        vectors: Text encoder -> vectors of its words, `[n, D]`.
        taken: Its deltas; None for an embedding only.
        files: File names, for the provenance.
    """
    words = default_words(name, len(next(iter(vectors.values()))))
    tokens = TokenGroup(words, {encoder: _half(vector).unsqueeze(0) for encoder, vector in vectors.items()})
    deltas = {} if taken is None else {key: LowRankDelta(_half(d.up), _half(d.down), d.scale)
                                       for key, d in _one_rank(taken.deltas).items()}
    info = ConceptInfo(name, class_noun, METHOD, words, kind, Provenance(settings={"files": list(files)}))
    concept = Concept(info, tokens, deltas)
    concept.check_fits(layout)
    acting = "" if taken is None else "; it acts on all words of a prompt that names it, as a LoRA does"
    notes = [f"<{name}> stands for {len(words)} learned word{'s' * (len(words) > 1)}{acting}"]
    return Imported(concept, (*notes, *(() if taken is None else _told(taken))))


def _told(taken: Taken) -> list[str]:
    notes = [f"taken: {len(taken.deltas)} text cross-attention layers, {100 * taken.share:.0f} % of what the "
             "LoRA changes"]
    left = [f"{count} {what}" for what, count in taken.left.items() if count]
    return notes + ([f"left out: {', '.join(left)}; what they do is not in the concept"] if left else [])


def _one_rank(deltas: Mapping[DeltaKey, LowRankDelta]) -> dict[DeltaKey, LowRankDelta]:
    """Pads factors with zeros to one rank per projection, as a bank requires."""
    ranks: dict[str, int] = {}
    for (_, projection), delta in deltas.items():
        ranks[projection] = max(ranks.get(projection, 0), delta.down.shape[0])
    missing = {key: ranks[key[1]] - delta.down.shape[0] for key, delta in deltas.items()}
    pad = torch.nn.functional.pad
    return {key: LowRankDelta(pad(d.up, (0, missing[key])), pad(d.down, (0, 0, 0, missing[key])), d.scale)
            for key, d in deltas.items()}


def _half(tensor: Tensor) -> Tensor:
    """Converts to float16 if the range allows it, else to float32."""
    half = tensor.half()
    return half if torch.isfinite(half).all() else tensor


def import_concept(name: str, class_noun: str, kind: str, layout: SiteLayout,
                   encoders: Iterable[TextEncoder] = (), lora: Path | str | None = None,
                   embedding: Path | str | None = None, trigger: str = "") -> Imported:
    """Makes a concept from a LoRA file, an embedding file or both.

    Args:
        encoders: A backbone's text encoders, for `trigger`.
        trigger: Trigger words of a LoRA without learned words.

    Raises:
        ConceptError: A file cannot be read or does not fit, or there are no words for the concept.
    """
    check_name(name)
    class_noun = check_class_noun(class_noun)
    files: list[str] = []
    taken: Taken | None = None
    vectors: dict[str, Tensor] | None = None
    if lora is not None:
        owner, file = f"the LoRA '{Path(lora).name}'", read_lora(lora)
        files.append(Path(lora).name)
        taken = lora_deltas(file, layout, owner)
        if file.words and embedding is None:
            vectors = embedding_vectors(file.words, layout, owner)
    if embedding is not None:
        files.append(Path(embedding).name)
        vectors = embedding_vectors(read_embedding(embedding), layout, f"the embedding '{files[-1]}'")
    if not files:
        raise ConceptError("there is nothing to import; give a LoRA file, an embedding file or both")
    if vectors is None and trigger.strip():
        vectors = trigger_vectors(encoders, trigger.strip())
    if vectors is None:
        raise ConceptError(f"the LoRA '{files[0]}' has no learned words; give the trigger words that are "
                           "typed for it, or an embedding file")
    return imported(name, class_noun, kind, layout, vectors, taken, tuple(files))

"""Reads embedding files of other programs: textual inversion and pivotal tuning."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..bank.tokens import MAX_WORDS
from ..errors import ConceptError
from ..model.sites import SiteLayout
from .lora_file import chosen, read_tensors
from .lora_names import part_of, shown

LARGEST_EMBEDDING = 16 << 20      # bytes
# diffusers' training keys
_ENCODERS = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g", "text_encoders_2": "t5xxl"}
_KNOWN = {"clip_l", "clip_g", "clip_h", "t5xxl"}
# the words of one embedding: <s0>, <s1> in pivotal tuning; <cat>, <cat>_1, <cat>_2 in diffusers
_NUMBERED = re.compile(r"<s(?P<pivotal>\d{1,3})>|(?P<first>.+)_(?P<number>\d{1,3})")


def read_embedding(path: Path | str) -> Mapping[str, Tensor]:
    """Reads all tensors of a small `.safetensors` file. Raises ConceptError for anything else."""
    path = Path(path)
    if path.is_file() and path.stat().st_size > LARGEST_EMBEDDING:
        raise ConceptError(f"'{path.name}' is larger than {LARGEST_EMBEDDING >> 20} MB; an embedding is a "
                           "few hundred kilobytes")
    return read_tensors(path, lambda key: True)[0]


def embedding_vectors(tensors: Mapping[str, Tensor], layout: SiteLayout, owner: str,
                      which: str = "") -> tuple[dict[str, Tensor], list[str]]:
    """Vectors of the words, and notes on what was joined or left out.

    Args:
        tensors: With keys clip_l and clip_g, or diffusers' text_encoders_0 and _1. For one encoder, any
            single tensor, or several embeddings by name.
        which: The embedding to take from several.

    Returns:
        Text encoder -> `[n, D]`, float32.
    """
    widths = dict(layout.text_widths)
    named = {_ENCODERS.get(key, key): tensor for key, tensor in tensors.items()}
    notes: list[str] = []
    if set(widths) <= set(named):
        other = sorted(set(named) - set(widths))
        if other:
            made_for = ", which this base does not have; it may draw differently here"
            notes.append(f"left out of the embedding: the vectors for {_listed(other)}"
                         f"{made_for if set(other) <= _KNOWN else ''}")
        return _checked({encoder: named[encoder] for encoder in widths}, widths, owner), notes
    if len(widths) > 1 or not tensors or (len(tensors) > 1 and set(named) & _KNOWN):
        raise ConceptError(f"{owner} holds {_listed(tensors) or 'nothing'}; allowed: vectors for "
                           f"{', '.join(widths)}")
    if any(part_of(key) is not None for key in tensors):
        raise ConceptError(f"{owner} is a LoRA file; allowed: an embedding. Give it as the LoRA")
    groups = _groups(tensors, which)
    name = chosen(groups, which, owner, "embeddings")
    if len(groups) > 1:
        notes.append(f"taken: the embedding {shown(name)}; left out: {_listed(set(groups) - {name})}")
    encoder, = widths
    rows = [_checked({encoder: tensors[key]}, widths, owner)[encoder] for key in groups[name]]
    if len(rows) > 1:
        notes.append(f"the words {', '.join(map(shown, groups[name]))} of the file are one concept, in this "
                     "order")
    return counted({encoder: torch.cat(rows)}, owner), notes


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(shown, sorted(names)[:6]))


def _groups(tensors: Mapping[str, Tensor], which: str) -> dict[str, list[str]]:
    """Name of an embedding -> its tensors' names. Numbered words of one embedding are together, unless
    `which` names them one by one.
    """
    groups: dict[str, list[tuple[int, str]]] = {}
    single = {name.strip() for name in which.split(",")}
    for key in tensors:
        name, number = key, 0
        match = _NUMBERED.fullmatch(key)
        if match is not None and key not in single and (match["pivotal"] or match["first"] in tensors):
            name, number = match["first"] or "<s0>", int(match["pivotal"] or match["number"])
        groups.setdefault(name, []).append((number, key))
    return {name: [key for _, key in sorted(keys)] for name, keys in groups.items()}


def _checked(tensors: Mapping[str, Tensor], widths: Mapping[str, int], owner: str) -> dict[str, Tensor]:
    vectors = {}
    for encoder, tensor in tensors.items():
        width = widths[encoder]
        # in eight bits, numbers cannot be tested for NaN: float32 first
        fits = tensor.dtype.is_floating_point and tensor.ndim in (1, 2) and tensor.shape[-1] == width
        numbers = tensor.float() if fits else tensor
        if not fits or not torch.isfinite(numbers).all():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ConceptError(f"{owner} has vectors of shape {tuple(tensor.shape)} for '{encoder}', {kind}; "
                               f"allowed: finite numbers [n, {width}]")
        vectors[encoder] = numbers.view(-1, width)
    return counted(vectors, owner)


def counted(vectors: dict[str, Tensor], owner: str) -> dict[str, Tensor]:
    """Returns the vectors. Raises ConceptError unless a concept can hold them as its words."""
    counts = sorted({len(vector) for vector in vectors.values()})
    if len(counts) != 1 or not 1 <= counts[0] <= MAX_WORDS:
        listed = " and ".join(map(str, counts))
        raise ConceptError(f"{owner} has {listed} vectors; allowed: 1 to {MAX_WORDS}, the most words of a "
                           "concept, as many for each text encoder")
    return vectors

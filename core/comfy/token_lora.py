"""Word-bound concepts in ComfyUI: which token belongs to which concept travels in the CONDITIONING, what it does there is a program."""

from __future__ import annotations

import hashlib
from collections import ChainMap
from collections.abc import Mapping

import torch
from torch import Tensor

from ..attention.cached import CachedTokenLora
from ..attention.token_lora import TokenLora, TokenLoraProcessor
from ..model.deltas import Deltas
from .sites import TEXT, WORDS, progress_of


def code(name: str) -> int:
    """A concept's name as a whole number above 0, the same in every process; the host moves whole numbers about as they are."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") + 1


def words_of(codes: Tensor, names: Mapping[int, str]) -> tuple[dict[str, tuple[int, ...]], ...]:
    """codes `[B, 1, N, 1]` as a context's words: concept -> positions, for the concepts in `names`."""
    found: list[dict[str, tuple[int, ...]]] = []
    for row in codes[:, 0, :, 0].tolist():
        words: dict[str, list[int]] = {}
        for position, value in enumerate(row):
            if value in names:
                words.setdefault(names[value], []).append(position)
        found.append({name: tuple(places) for name, places in words.items()})
    return tuple(found)


class TokenLoraRun:
    """What a MODEL with bound concepts does in each UNet call. deltas: concept -> its deltas; `below`: another such run under it; `base`:
    the host's model, which says whether its weights change within a sampling."""

    def __init__(self, deltas: Mapping[str, Deltas], below: TokenLoraRun | None = None, base=None) -> None:
        self.deltas = ChainMap(deltas, below.deltas if below is not None else {})
        self.codes = {name: code(name) for name in self.deltas}
        self.base = base
        self._moved: dict[tuple[str, str], Deltas] = {}
        self._kept: dict[tuple, tuple[tuple, TokenLoraProcessor | None]] = {}      # kind of call -> its text and what was made of it
        self._sampling: Tensor | None = None                                 # that these are of, by its noise levels

    def __call__(self, options: dict, x: Tensor) -> TokenLoraProcessor | None:
        """None when no prompt of this call has words of the concepts: then the host's own attention runs, untouched."""
        text = options.get(TEXT)
        if text is None or self.base is None or torch.is_grad_enabled() or not self._stays(options):
            concepts = self.concepts(options, x)
            return _processor(TokenLoraProcessor({}), concepts) if concepts else None
        kind = tuple(options["cond_or_uncond"]), str(x.device), len(x)
        if kind not in self._kept or not _same(self._kept[kind][0], text):
            concepts = self.concepts(options, x)
            self._kept[kind] = text, CachedTokenLora(concepts, len(x), x.device) if concepts else None
        is_last = progress_of(options) == 1.0      # nothing stays in memory when the sampling is over
        return (self._kept.pop(kind) if is_last else self._kept[kind])[1]

    def _stays(self, options: dict) -> bool:
        """Whether weights are the same in all steps. What is kept of another sampling is forgotten: it may have had others."""
        sampling = options.get("sample_sigmas")
        if sampling is not self._sampling:
            self._kept, self._sampling = {}, sampling
        hooks = getattr(getattr(self.base, "current_patcher", None), "current_hooks", None)
        return sampling is not None and hooks is None

    def concepts(self, options: dict, x: Tensor) -> TokenLora:
        codes = options.get(WORDS)
        if codes is None:
            return TokenLora.at({}, {})
        here = codes[:, 0, :, 0]
        present = set(here.unique().tolist())      # one look at the device, however many concepts there are
        masks = {name: (here == value).float() for name, value in self.codes.items() if value in present}
        return TokenLora.at(masks, {name: self._on(name, x) for name in masks})

    def _on(self, name: str, x: Tensor) -> Deltas:
        key = (name, str(x.device))
        if key not in self._moved:      # once per sampling and device, not in every step
            self._moved[key] = {place: delta.to(x.device) for place, delta in self.deltas[name].items()}
        return self._moved[key]


def _processor(processor: TokenLoraProcessor, concepts: TokenLora) -> TokenLoraProcessor:
    processor.concepts = concepts
    return processor


def _same(one: tuple, other: tuple) -> bool:
    """Whether two texts are the same tensors in what they hold."""
    return all((a is None) == (b is None) and (a is None or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)))
               for a, b in zip(one, other, strict=True))

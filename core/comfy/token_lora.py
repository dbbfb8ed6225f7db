"""Word-bound concepts in ComfyUI. The CONDITIONING stores which concept each token belongs to, for the
attention processor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ..attention.cached import CachedTokenLora
from ..attention.token_lora import TokenLora, TokenLoraProcessor
from ..model.context import Strengths, strengths_or_none
from ..model.deltas import Deltas
from .sites import STRENGTHS, TEXT, WORDS, progress_of


def code(name: str) -> int:
    """A concept's name as a positive integer, the same in every process. The host passes integers on
    unchanged.
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") + 1


Words = tuple[dict[str, tuple[int, ...]], ...]


def words_of(codes: Tensor, strengths: Tensor, names: Mapping[int, str]) -> tuple[Words, Strengths]:
    """The words of a context and their strengths, see `Context`.

    Args:
        codes: `[B, S, N, 1]`.
        strengths: `[B, S, N, 1]`.
        names: Code -> concept, for the concepts to look for.
    """
    words, factors = [], []
    for row, row_strengths in zip(codes[..., 0].tolist(), strengths[..., 0].tolist(), strict=True):
        found: dict[str, dict[int, float]] = {}
        for slot, slot_strengths in zip(row, row_strengths, strict=True):
            for position, (value, strength) in enumerate(zip(slot, slot_strengths, strict=True)):
                if value in names:
                    found.setdefault(names[value], {})[position] = strength
        words.append({name: tuple(sorted(places)) for name, places in found.items()})
        factors.append({name: tuple(places[place] for place in sorted(places))
                        for name, places in found.items()})
    return tuple(words), strengths_or_none(tuple(factors))


class TokenLoraRun:
    """Provides the attention processors of a MODEL with word-bound concepts.

    Args:
        deltas: Concept -> its deltas.
        below: Another such run whose concepts also act. If both have a concept of the same name, that of
            `deltas` acts.
        base: The host's model, to detect whether weights change during a sampling. Without it, nothing is
            cached.
    """

    def __init__(self, deltas: Mapping[str, Deltas], below: TokenLoraRun | None = None, base=None) -> None:
        # deltas are read from the bank when a prompt contains the concept's words
        sources = dict.fromkeys(deltas, deltas)
        self._sources: dict[str, Mapping[str, Deltas]] = (
            sources if below is None else below._sources | sources)
        self._codes = {name: code(name) for name in self._sources}
        self._base = base
        self._on_device: dict[tuple[str, str], Deltas] = {}
        # kind of call -> text and processor
        self._cached: dict[tuple, tuple[tuple, TokenLoraProcessor | None]] = {}
        self._sampling: Tensor | None = None      # noise levels of the sampling that the cache is valid for

    def __call__(self, options: dict, x: Tensor) -> TokenLoraProcessor | None:
        """Returns None if no prompt of this call contains words of the concepts. The host's attention then
        runs unchanged.
        """
        text = options.get(TEXT)
        if text is None or not self._has_constant_weights(options):
            concepts = self.concepts(options, x)
            if not concepts:
                return None
            processor = TokenLoraProcessor({})
            processor.concepts = concepts
            return processor
        kind = tuple(options["cond_or_uncond"]), str(x.device), len(x)
        if kind not in self._cached or not _is_same(self._cached[kind][0], text):
            concepts = self.concepts(options, x)
            self._cached[kind] = text, CachedTokenLora(concepts, len(x), x.device) if concepts else None
        is_last = progress_of(options) == 1.0      # free the memory after the sampling
        return (self._cached.pop(kind) if is_last else self._cached[kind])[1]

    def _has_constant_weights(self, options: dict) -> bool:
        """Whether the weights are known to be constant during the sampling. Clears the cache of an earlier
        sampling, which may have used other weights.
        """
        sampling = options.get("sample_sigmas")
        if sampling is not self._sampling:
            self._cached, self._sampling = {}, sampling
        hooks = getattr(getattr(self._base, "current_patcher", None), "current_hooks", None)
        is_known = self._base is not None and sampling is not None and hooks is None
        return is_known and not torch.is_grad_enabled()

    def concepts(self, options: dict, x: Tensor) -> TokenLora:
        """The word-bound concepts of the prompts of a UNet call."""
        codes = options.get(WORDS)
        if codes is None:
            return TokenLora.at({}, {})
        here, strengths = codes[..., 0], options[STRENGTHS][..., 0]      # [B, S, N]
        # a single transfer from the device for any number of concepts
        present = set(here.unique().tolist())
        masks = {name: ((here == value) * strengths.float()).sum(1)
                 for name, value in self._codes.items() if value in present}
        return TokenLora.at(masks, {name: self._deltas_on(name, x.device) for name in masks})

    def _deltas_on(self, name: str, device: torch.device) -> Deltas:
        key = (name, str(device))
        if key not in self._on_device:      # cached per sampling and device
            deltas = self._sources[name][name]
            self._on_device[key] = {place: delta.to(device) for place, delta in deltas.items()}
        return self._on_device[key]


def _is_same(one: tuple[Tensor | None, ...], other: tuple[Tensor | None, ...]) -> bool:
    """Whether two texts have the same values."""
    return all((a is b) if a is None or b is None else a.shape == b.shape and a.dtype == b.dtype
               and torch.equal(a, b)
               for a, b in zip(one, other, strict=True))

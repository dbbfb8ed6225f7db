"""Word-bound concepts in ComfyUI: which token belongs to which concept travels in the CONDITIONING, what it does there is a program."""

from __future__ import annotations

import hashlib
from collections import ChainMap
from collections.abc import Mapping

from torch import Tensor

from ...bound import BoundConcepts, BoundProgram
from ...deltas import Deltas
from .sites import WORDS


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


class BoundRun:
    """What a MODEL with bound concepts does in each UNet call. deltas: concept -> its deltas; `below`: another such run under it."""

    def __init__(self, deltas: Mapping[str, Deltas], below: BoundRun | None = None) -> None:
        self.deltas = ChainMap(deltas, below.deltas if below is not None else {})
        self.codes = {name: code(name) for name in self.deltas}
        self._moved: dict[tuple[str, str], Deltas] = {}

    def __call__(self, options: dict, x: Tensor) -> BoundProgram | None:
        """None when no prompt of this call has words of the concepts: then the host's own attention runs, untouched."""
        concepts = self.concepts(options, x)
        if not concepts:
            return None
        program = BoundProgram({})
        program.concepts = concepts
        return program

    def concepts(self, options: dict, x: Tensor) -> BoundConcepts:
        codes = options.get(WORDS)
        if codes is None:
            return BoundConcepts.at({}, {})
        here = codes[:, 0, :, 0]
        present = set(here.unique().tolist())      # one look at the device, however many concepts there are
        own = {name: (here == value).float() for name, value in self.codes.items() if value in present}
        return BoundConcepts.at(own, {name: self._on(name, x) for name in own})

    def _on(self, name: str, x: Tensor) -> Deltas:
        key = (name, str(x.device))
        if key not in self._moved:      # once per sampling and device, not in every step
            self._moved[key] = {place: delta.to(x.device) for place, delta in self.deltas[name].items()}
        return self._moved[key]

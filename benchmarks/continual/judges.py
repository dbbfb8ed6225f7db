"""Judges: how well a picture shows a concept. Every figure of the benchmark is measured by each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...core.data.assignment import Assignment
from ...core.evaluation.protocol import Encoder

ENCODER, TEMPLATE = "encoder", "template"      # names of the judges in result files


class Judge(Protocol):
    """Compares pictures with the concepts of a sequence."""

    def scores(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """How well each picture shows each concept.

        Args:
            images: `[B, 3, H, W]` in -1..1.
            names: K concepts.

        Returns:
            Scores `[B, K]`. Higher is better; the scale is the judge's own.
        """
        ...

    def among_references(self, name: str) -> float:
        """Mean score of a concept's training pictures, each compared without itself where it is compared with
        training pictures."""
        ...


class EncoderJudge:
    """Mean cosine of a picture's features with those of the concept's training pictures (CIDM's IA).

    Args:
        encoder: The metric encoder.
        tasks: The concepts with their training pictures.
    """

    def __init__(self, encoder: Encoder, tasks: Sequence[Assignment]) -> None:
        self._encoder, self._tasks = encoder, {task.name: task for task in tasks}
        self._references: dict[str, Tensor] = {}

    def features_of(self, name: str) -> Tensor:
        """Features `[N, D]` of a concept's training pictures."""
        if name not in self._references:
            task = self._tasks[name]
            self._references[name] = self._encoder.features(task.references, task.kind)
        return self._references[name]

    def scores(self, images: Tensor, names: Sequence[str]) -> Tensor:
        kinds = {name: self._tasks[name].kind for name in names}
        features = {kind: self._encoder.features(images, kind) for kind in sorted(set(kinds.values()))}
        return torch.stack([(features[kind] @ self.features_of(name).T).mean(1)
                            for name, kind in kinds.items()], dim=1)

    def among_references(self, name: str) -> float:
        features = self.features_of(name)
        if len(features) == 1:
            return 1.0
        others = ~torch.eye(len(features), dtype=torch.bool, device=features.device)
        return float((features @ features.T)[others].mean())


Judges = Mapping[str, Judge]

"""Real pictures of several drawn individuals side by side, which nothing was trained on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ...core.demo.judges import to_tensor
from ...core.demo.render import render
from ...core.demo.scenes import Placed, Scene, SceneConcept, Thing, random_scene

SEED, PICTURES = 80_000, 24
WIDTHS = {3: (0.27, 0.33)}      # of three side by side; `scenes.place` knows one and two


def _scene(rng: random.Random, things: tuple[Thing, ...]) -> Scene:
    if len(things) < 3:
        return random_scene(rng, things, "photo")
    scene, low_high = random_scene(rng, things[:2], "photo"), WIDTHS[3]
    centres = [(2 * i + 1) / (2 * len(things)) for i in range(len(things))]
    placed = [Placed(thing, x, rng.uniform(0.52, 0.68), rng.uniform(*low_high), rng.random() < 0.5)
              for thing, x in zip(things, centres, strict=True)]
    return replace(scene, objects=tuple(placed))


def side_by_side(concepts: Sequence[SceneConcept], size: int, count: int = PICTURES,
                 seed: int = SEED) -> Tensor:
    """Pictures `[count, 3, size, size]` in -1..1 of two or three individuals, in the scenes of photos."""
    rng = random.Random(seed)
    things = tuple(concept.thing for concept in concepts if concept.thing is not None)
    return to_tensor([render(_scene(rng, things), size) for _ in range(count)])

"""Photos of a drawn concept in two halves that show it in different ways."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from torch import Tensor

from ...core.data.pictures import Picture, photo_digest
from ...core.demo import scenes
from ...core.demo.judges import to_tensor
from ...core.demo.render import render
from ...core.demo.scenes import Scene, SceneConcept

HELD_OUT = 24      # real pictures of each half
FIRST_SEED, HELD_OUT_SEED = 40, 91_000


@dataclass(frozen=True)
class View:
    """How one half shows a concept.

    Attributes:
        photos: How many are learned from.
        places: Backgrounds of an object.
        subjects: What a style draws.
        sizes: Smallest and largest width, as a fraction of the picture.
        across: Range of the place from the left edge, 0, to the right edge, 1.
        mirrored: Directions, taken in turn.
    """

    photos: int
    places: tuple[str, ...]
    subjects: tuple[str, ...]
    sizes: tuple[float, float]
    across: tuple[float, float]
    mirrored: tuple[bool, ...]


VIEWS = {
    "old": View(2, ("night",), ("dog",), (0.42, 0.46), (0.0, 0.2), (False,)),
    "new": View(6, ("beach", "meadow", "snow", "room"), ("cat", "fish", "car", "robot", "backpack"),
                (0.58, 0.72), (0.3, 1.0), (True, False)),
}
HALVES = tuple(VIEWS)


@dataclass(frozen=True)
class Half:
    """photos: with captions, to learn from; held_out: `[n, 3, H, W]` in -1..1, to compare with; prompts: with
    the placeholder; noun_prompts: with the class noun instead."""

    photos: tuple[Picture, ...]
    held_out: Tensor
    prompts: tuple[str, ...]
    noun_prompts: tuple[str, ...]


def _seen(view: View, scene: Scene, rng: random.Random, number: int) -> Scene:
    """A scene of one thing with the size, place and direction of a view."""
    size = rng.uniform(*view.sizes)
    x = 0.5 * size + rng.uniform(*view.across) * (1 - size)
    placed = replace(scene.objects[0], x=x, size=size, flip=view.mirrored[number % len(view.mirrored)])
    return replace(scene, objects=(placed,))


def _drawn(concept: SceneConcept, view: View, count: int, seed: int, side: int) -> tuple[Tensor, list[str]]:
    """Pictures `[count, 3, side, side]` of a view, and their prompts with `{}` for the concept."""
    rng, pictures, texts = random.Random(seed), [], []
    for i in range(count):
        if concept.thing is not None:
            place = view.places[i % len(view.places)]
            scene = replace(scenes.random_scene(rng, (concept.thing,), "photo"), background=place)
            texts.append(f"a photo of {{}} {scenes.BACKGROUNDS[place]}")
        else:
            subject = view.subjects[i % len(view.subjects)]
            scene = scenes.random_scene(rng, (scenes.random_thing(rng, subject),), concept.style)
            texts.append(f"{{}} of {scenes.article(subject)}")
        pictures.append(render(_seen(view, scene, rng, i), side))
    return to_tensor(pictures), texts


def half_of(concept: SceneConcept, half: str, side: int) -> Half:
    """One half of a concept's photos. half: `old` or `new`; side: of the pictures in pixels."""
    view, number = VIEWS[half], HALVES.index(half)
    shown, texts = _drawn(concept, view, view.photos, FIRST_SEED + number, side)
    held_out, asked = _drawn(concept, view, HELD_OUT, HELD_OUT_SEED + number, side)
    name, noun = f"<{concept.name}>", scenes.article(concept.class_noun)
    photos = tuple(Picture(image, text.format(name), digest=photo_digest(image))
                   for image, text in zip(shown, texts, strict=True))
    different = tuple(dict.fromkeys(asked))
    return Half(photos, held_out, tuple(text.format(name) for text in different),
                tuple(text.format(noun) for text in different))

"""Photos of a drawn concept in two halves that differ visibly."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from torch import Tensor

from ...core.data.pictures import Picture, photo_digest
from ...core.demo import scenes
from ...core.demo.judges import to_tensor
from ...core.demo.render import render
from ...core.demo.scenes import SceneConcept, Thing

PHOTOS, HELD_OUT = 4, 24      # of each half
FIRST_SEED, HELD_OUT_SEED = 40, 91_000
HAT = (250, 250, 250)
# An object is outdoors without anything on, then indoors or at night with a white hat.
PLACES = {"old": ("beach", "meadow", "snow"), "new": ("room", "night")}
WORN = {"old": "none", "new": "hat"}
# A style draws animals, then things.
SUBJECTS = {"old": ("dog", "cat", "fish"), "new": ("car", "robot", "backpack")}
HALVES = tuple(PLACES)


@dataclass(frozen=True)
class Half:
    """photos: with captions, to learn from; held_out: `[n, 3, H, W]` in -1..1, to compare with; prompts: with
    the placeholder; noun_prompts: with the class noun instead."""

    photos: tuple[Picture, ...]
    held_out: Tensor
    prompts: tuple[str, ...]
    noun_prompts: tuple[str, ...]


def _drawn(concept: SceneConcept, thing: Thing | None, half: str, count: int, seed: int,
           side: int) -> tuple[Tensor, list[str]]:
    """Pictures `[count, 3, side, side]` of a half, and their prompts with `{}` for the concept."""
    rng, pictures, texts = random.Random(seed), [], []
    for i in range(count):
        if thing is not None:
            place = PLACES[half][i % len(PLACES[half])]
            scene = replace(scenes.random_scene(rng, (thing,), "photo"), background=place)
            worn = " wearing a white hat" if thing.accessory == "hat" else ""
            texts.append(f"a photo of {{}}{worn} {scenes.BACKGROUNDS[place]}")
        else:
            kind = SUBJECTS[half][i % len(SUBJECTS[half])]
            scene = scenes.random_scene(rng, (scenes.random_thing(rng, kind),), concept.style)
            texts.append(f"{{}} of {scenes.article(kind)}")
        pictures.append(render(scene, side))
    return to_tensor(pictures), texts


def half_of(concept: SceneConcept, half: str, side: int) -> Half:
    """One half of a concept's photos. half: `old` or `new`; side: of the pictures in pixels."""
    thing = None if concept.thing is None else replace(concept.thing, accessory=WORN[half],
                                                       accessory_colour=HAT)
    number = HALVES.index(half)
    shown, texts = _drawn(concept, thing, half, PHOTOS, FIRST_SEED + number, side)
    held_out, asked = _drawn(concept, thing, half, HELD_OUT, HELD_OUT_SEED + number, side)
    name, noun = f"<{concept.name}>", scenes.article(concept.class_noun)
    photos = tuple(Picture(image, text.format(name), digest=photo_digest(image))
                   for image, text in zip(shown, texts, strict=True))
    different = tuple(dict.fromkeys(asked))
    return Half(photos, held_out, tuple(text.format(name) for text in different),
                tuple(text.format(noun) for text in different))

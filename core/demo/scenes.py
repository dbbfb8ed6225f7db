"""Drawn scenes, on which the embedded base was trained: things, scenes, captions, and concepts to learn.

Everything is a pure function of a passed `random.Random`. Some colours have no name, and captions omit
attributes. The base has therefore seen things that no caption fully describes; such things can be learned as
concepts.
"""

from __future__ import annotations

import colorsys
import hashlib
import random
from dataclasses import dataclass, field

import numpy as np

from .render import PICTURE_SIZE, SCARF_AT, Style, render

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 44),
    "orange": (240, 132, 30),
    "yellow": (246, 212, 48),
    "green": (52, 148, 62),
    "blue": (44, 86, 206),
    "purple": (124, 54, 164),
    "pink": (246, 142, 184),
    "brown": (122, 74, 40),
    "white": (240, 240, 240),
    "black": (44, 44, 48),
}
PART_NOUN = {
    "dog": "ears",
    "cat": "ears",
    "duck toy": "beak",
    "teddy bear": "ears",
    "backpack": "pocket",
    "fish": "fins",
    "car": "wheels",
    "robot": "arms",
}
KINDS = tuple(PART_NOUN)
PATTERNS = ("plain", "striped", "spotted", "checked")
MARKS = {"striped": "stripes", "spotted": "spots", "checked": "checks"}
BACKGROUNDS = {
    "beach": "on a beach",
    "meadow": "in a meadow",
    "snow": "in the snow",
    "night": "at night",
    "room": "in a room",
    "plain": "on a {colour} background",
}
STYLES = {
    style.name: style
    for style in (
        Style("photo", "a photo of", shaded=True),
        Style("ink", "an ink drawing of", paper=(250, 248, 240), line=(24, 22, 26), fill=0.0),
        Style("pastel", "a pastel painting of", paper=(250, 238, 224), fill=0.45),
        Style("neon", "a neon sign of", paper=(14, 10, 26), fill=0.08, line_from_role=True),
        Style("mosaic", "a mosaic of", tile=4),
    )
}
OFF_PALETTE = 0.2  # share of colours without a name
HELD_OUT = 10  # one in this many combinations (kind, colour, pattern) is held out of pretraining


@dataclass(frozen=True)
class Thing:
    """One individual. Colours are RGB in 0..255; pattern_scale stretches the markings (1 = usual)."""

    kind: str
    body: tuple[int, int, int]
    second: tuple[int, int, int]
    pattern: str = "plain"
    pattern_colour: tuple[int, int, int] = (255, 255, 255)
    pattern_scale: float = 1.0
    accessory: str = "none"
    accessory_colour: tuple[int, int, int] = (255, 255, 255)
    # attribute -> colour word, if there is one
    names: dict = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Placed:
    """A thing in a picture: centre and width as fractions of the picture."""

    thing: Thing
    x: float
    y: float
    size: float
    flip: bool = False


@dataclass(frozen=True)
class Scene:
    objects: tuple[Placed, ...]
    background: str
    background_colour: tuple[int, int, int]
    background_name: str
    style: Style


def held_out(kind: str, colour: str, pattern: str) -> bool:
    """Whether this combination is held out of pretraining, for testing."""
    digest = hashlib.sha256(f"{kind}|{colour}|{pattern}".encode()).digest()
    return digest[0] % HELD_OUT == 0


def _jitter(rng: random.Random, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (int(min(255, max(0, c + rng.uniform(-12, 12)))) for c in rgb)
    return red, green, blue


def _colour(rng: random.Random) -> tuple[tuple[int, int, int], str | None]:
    if rng.random() < OFF_PALETTE:
        hue, saturation, value = rng.random(), rng.uniform(0.25, 1.0), rng.uniform(0.35, 1.0)
        red, green, blue = (int(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value))
        return (red, green, blue), None
    name = rng.choice(list(PALETTE))
    return _jitter(rng, PALETTE[name]), name


def _contrasting(rng: random.Random, other: tuple[int, int, int]) -> tuple[tuple[int, int, int], str | None]:
    while True:
        rgb, name = _colour(rng)
        if sum(abs(a - b) for a, b in zip(rgb, other, strict=True)) > 110:
            return rgb, name


def random_thing(rng: random.Random, kind: str | None = None, unseen: bool = False) -> Thing:
    """A random individual. `unseen=True` draws only combinations held out of pretraining."""
    while True:
        chosen = kind or rng.choice(KINDS)
        pattern = rng.choice(PATTERNS)
        body, body_name = _colour(rng)
        if (body_name is not None and held_out(chosen, body_name, pattern)) == unseen:
            break
    second, second_name = _contrasting(rng, body)
    marks, marks_name = _contrasting(rng, body)
    accessories = ("none", "none", "hat", "scarf") if chosen in SCARF_AT else ("none", "none", "hat")
    accessory = rng.choice(accessories)
    worn, worn_name = _contrasting(rng, body)
    names = {"body": body_name, "second": second_name, "pattern": marks_name, "accessory": worn_name}
    colour_names = {key: name for key, name in names.items() if name}
    return Thing(chosen, body, second, pattern, marks, rng.uniform(0.8, 1.25), accessory, worn, colour_names)


def article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def describe(thing: Thing, rng: random.Random, detail: float = 0.75, colours: bool = True, size_word: str
             | None = None) -> str:
    """A truthful noun phrase.

    Each attribute is mentioned with probability `detail`. Use `colours=False` for styles without colours.
    """

    def told() -> bool:
        return rng.random() < detail

    names = thing.names if colours else {}
    words = [size_word] if size_word else []
    if "body" in names and told():
        words.append(names["body"])
    show_pattern = thing.pattern != "plain" and told()
    # "striped" alone, or "striped with blue" when the colour of the marks has a word.
    if show_pattern:
        words.append(thing.pattern)
    phrase = article(" ".join([*words, thing.kind]))
    tail = []
    if show_pattern and "pattern" in names and told():
        tail.append(f"{names['pattern']} {MARKS[thing.pattern]}")
    if "second" in names and told():
        tail.append(f"{names['second']} {PART_NOUN[thing.kind]}")
    if tail:
        phrase += " with " + " and ".join(tail)
    if thing.accessory != "none" and told():
        worn = f"{names['accessory']} {thing.accessory}" if "accessory" in names else thing.accessory
        phrase += f" wearing {article(worn)}"
    return phrase


def shows_colours(style: Style) -> bool:
    return style.fill > 0.3 or style.line_from_role


def place(rng: random.Random, things: tuple[Thing, ...]) -> tuple[Placed, ...]:
    """Places one thing near the middle, or two things side by side."""
    if len(things) == 1:
        size = rng.uniform(0.42, 0.72)
        return (Placed(things[0], rng.uniform(0.5 * size, 1 - 0.5 * size), rng.uniform(0.5, 0.66), size,
                       rng.random() < 0.5),)
    sizes = [rng.uniform(0.38, 0.5) for _ in things]
    centres = (rng.uniform(0.24, 0.29), rng.uniform(0.71, 0.76))
    return tuple(Placed(t, x, rng.uniform(0.52, 0.68), s, rng.random() < 0.5)
                 for t, x, s in zip(things, centres, sizes, strict=True))


def random_scene(rng: random.Random, things: tuple[Thing, ...] | None = None, style: str | Style
                 | None = None, unseen: bool = False) -> Scene:
    if things is None:
        things = tuple(random_thing(rng, unseen=unseen) for _ in range(1 if rng.random() < 0.7 else 2))
    if style is None:
        style = rng.choices(list(STYLES.values()), weights=(6, 1, 1, 1, 1))[0]
    elif isinstance(style, str):
        style = STYLES[style]
    background = rng.choice(list(BACKGROUNDS))
    # A plain background must differ from the colours of the things on it, so that a black dog is never on
    # black.
    taken = {thing.names.get("body") for thing in things}
    name = rng.choice([word for word in PALETTE if word not in taken])
    return Scene(place(rng, things), background, _jitter(rng, PALETTE[name]), name, style)


def background_phrase(scene: Scene) -> str:
    return BACKGROUNDS[scene.background].format(colour=scene.background_name)


def caption(scene: Scene, rng: random.Random, detail: float = 0.75, nouns: tuple[str, ...]
            | None = None) -> str:
    """A truthful caption.

    `nouns` replaces the descriptions of the first things, for example by a concept's placeholder.
    """
    colours = shows_colours(scene.style)
    phrases = []
    for i, placed in enumerate(scene.objects):
        size_word = None
        if len(scene.objects) == 1 and rng.random() < 0.3:
            size_word = "small" if placed.size < 0.5 else "big" if placed.size > 0.64 else None
        if nouns is not None and i < len(nouns):
            phrases.append(nouns[i])
        else:
            phrases.append(describe(placed.thing, rng, detail, colours, size_word))
    if len(phrases) == 1 and nouns is None and rng.random() < 0.4:
        x = scene.objects[0].x
        phrases[0] += " on the left" if x < 0.42 else " on the right" if x > 0.58 else " in the middle"
    text = f"{scene.style.phrase} {' and '.join(phrases)}"
    if scene.style.paper is None and rng.random() < 0.85:
        text += f" {background_phrase(scene)}"
    return text


@dataclass(frozen=True)
class SceneConcept:
    """A concept that no pretraining caption names: an individual (kind 'object') or a style (kind 'style').
    """

    name: str
    class_noun: str
    kind: str
    thing: Thing | None = None
    style: Style | None = None

    def scene(self, rng: random.Random) -> Scene:
        if self.thing is not None:
            return random_scene(rng, (self.thing,), "photo")
        return random_scene(rng, (random_thing(rng),), self.style)

    def pictures(self, count: int, seed: int, size: int = PICTURE_SIZE) -> list[tuple[np.ndarray, str]]:
        """`count` pictures `[size, size, 3]` uint8, with captions that contain the placeholder `<name>`.

        The same seed gives the same scenes and captions at every size.
        """
        rng, result = random.Random(seed), []
        for _ in range(count):
            scene = self.scene(rng)
            if self.kind == "object":
                text = caption(scene, rng, nouns=(f"<{self.name}>",))
            else:
                described = describe(scene.objects[0].thing, rng, colours=False)
                text = f"<{self.name}> of {described}"
            result.append((render(scene, size), text))
        return result

    def distractor(self, rng: random.Random) -> Scene:
        """Draws another individual of the same class (or another style) in the same kind of scene."""
        if self.thing is not None:
            return random_scene(rng, (random_thing(rng, self.thing.kind),), "photo")
        return random_scene(rng, (random_thing(rng),), rng.choice([s for s in STYLES if s != "photo"]))


CONCEPTS: dict[str, SceneConcept] = {
    concept.name: concept
    for concept in (
        SceneConcept("rex", "dog", "object",
                     Thing("dog", (38, 176, 164), (196, 40, 122), "spotted", (250, 226, 120), 1.1,
                                                   "scarf", (232, 92, 30))),
        SceneConcept("mimi", "cat", "object",
                     Thing("cat", (236, 176, 96), (70, 46, 120), "striped", (164, 58, 50), 0.95,
                                                    "hat", (40, 150, 216))),
        SceneConcept("blueprint", "drawing", "style",
                     style=Style("blueprint", "", paper=(28, 74, 152), line=(224, 236, 255), fill=0.0)),
        SceneConcept("bolt", "robot", "object",
                     Thing("robot", (150, 190, 60), (90, 30, 60), "checked", (60, 110, 90), 1.0,
                                                      "hat", (250, 200, 210))),
        SceneConcept("fido", "dog", "object",
                     Thing("dog", (206, 150, 210), (60, 90, 50), "striped", (96, 40, 130), 0.9,
                                                    "hat", (240, 226, 90))),
        SceneConcept("chalk", "drawing", "style",
                     style=Style("chalk", "", paper=(40, 66, 52), fill=0.3, line=(236, 232, 214))),
    )
}


def sample(rng: random.Random, unseen: bool = False) -> tuple[np.ndarray, str]:
    """One pretraining pair: picture `[64, 64, 3]` uint8 and its caption."""
    scene = random_scene(rng, unseen=unseen)
    return render(scene), caption(scene, rng)

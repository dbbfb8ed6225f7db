"""Task sequences of drawn concepts: ten as in the CIFC benchmark, further random ones, and others for tuning.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from ...core.demo import scenes
from ...core.demo.render import Style
from ...core.demo.scenes import SceneConcept, Thing
from ...core.errors import ConceptError

_INDIVIDUALS = {
    "quack": Thing("duck toy", (120, 210, 190), (210, 70, 30), "checked", (30, 90, 110), 1.0, "hat",
                   (200, 60, 150)),
    "pack": Thing("backpack", (110, 60, 100), (240, 170, 70), "spotted", (120, 220, 180), 1.15, "none"),
    "teddy": Thing("teddy bear", (90, 120, 180), (250, 210, 190), "striped", (40, 50, 90), 1.0, "scarf",
                   (240, 220, 60)),
    "luna": Thing("cat", (96, 120, 90), (240, 190, 210), "spotted", (220, 240, 160), 1.0, "scarf",
                  (170, 40, 90)),
}
_CRIMSON = Style("crimson", "", paper=(246, 218, 214), line=(150, 16, 48), fill=0.12)
MORE: dict[str, SceneConcept] = {
    **{name: SceneConcept(name, thing.kind, "object", thing) for name, thing in _INDIVIDUALS.items()},
    "crimson": SceneConcept("crimson", "drawing", "style", style=_CRIMSON),
}
TEN = ("rex", "quack", "mimi", "pack", "teddy", "blueprint", "fido", "chalk", "luna", "crimson")
STYLE_EVERY = 5      # beyond the ten, every fifth concept is a style
CANDIDATES = 12      # a further individual is the least similar of this many random candidates
# Classes of the tuning suite, None for a style: two of one class, neighbours of different classes.
TUNING = ("robot", "duck toy", None, "fish", "robot", None)
TUNING_SEED = 7700
STYLES, STYLES_SEED = 4, 7711      # of the rates of styles


def _difference(thing: Thing, other: Thing) -> float:
    """RGB differences of body, second part and pattern, plus 150 for different patterns."""
    pairs = [(getattr(thing, part), getattr(other, part)) for part in ("body", "second", "pattern_colour")]
    colours = sum(abs(a - b) for both in pairs for a, b in zip(*both, strict=True))
    return colours + 150 * (thing.pattern != other.pattern)


def individual(rng: random.Random, name: str, kind: str, earlier: Sequence[SceneConcept]) -> SceneConcept:
    """A random individual of a class, the least similar of some candidates to the earlier ones."""
    relatives = [c.thing for c in earlier if c.thing is not None and c.thing.kind == kind]
    candidates = [scenes.random_thing(rng, kind) for _ in range(CANDIDATES)]
    thing = max(candidates,
                key=lambda candidate: min((_difference(candidate, r) for r in relatives), default=0.0))
    return SceneConcept(name, kind, "object", thing)


def random_style(rng: random.Random, name: str) -> SceneConcept:
    """A drawing style with random colours of paper and line."""
    dark = rng.random() < 0.5
    def colour(low: int, high: int) -> tuple[int, int, int]:
        return rng.randrange(low, high), rng.randrange(low, high), rng.randrange(low, high)

    paper = colour(20, 110) if dark else colour(190, 256)
    line = colour(190, 256) if dark else colour(0, 110)
    style = Style(name, "", paper=paper, line=line, fill=rng.choice((0.0, 0.15, 0.35)))
    return SceneConcept(style.name, "drawing", "style", style=style)


def concepts(count: int = 10) -> list[SceneConcept]:
    """The first `count` concepts of the sequence: the fixed ten, then random ones from a fixed seed."""
    if count < 1:
        raise ConceptError(f"the number of tasks is {count}; allowed: 1 or more")
    sequence, rng = [MORE.get(name) or scenes.CONCEPTS[name] for name in TEN], random.Random(50)
    for number in range(len(TEN) + 1, count + 1):
        is_style = number % STYLE_EVERY == 0
        kind = scenes.KINDS[number % len(scenes.KINDS)]
        sequence.append(random_style(rng, f"style{number}") if is_style
                        else individual(rng, f"thing{number}", kind, sequence))
    return sequence[:count]


def tuning_concepts() -> list[SceneConcept]:
    """The concepts with which settings are chosen. None of them is in `concepts(50)`."""
    sequence, rng = concepts(50), random.Random(TUNING_SEED)
    for number, kind in enumerate(TUNING, 1):
        sequence.append(random_style(rng, f"tuning{number}") if kind is None
                        else individual(rng, f"tuning{number}", kind, sequence))
    return sequence[50:]


def tuning_styles() -> list[SceneConcept]:
    """Further styles, with which the rates of styles are chosen. None of them is in `concepts(50)`."""
    rng = random.Random(STYLES_SEED)
    return [random_style(rng, f"tuningstyle{number}") for number in range(1, STYLES + 1)]


def ordered(count: int, order: int) -> list[int]:
    """Permutation of `count` tasks for an order: 0 as given, 1 reversed, others a shuffle with this seed."""
    places = list(range(count))
    if order == 1:
        places.reverse()
    elif order > 1:
        random.Random(order).shuffle(places)
    return places

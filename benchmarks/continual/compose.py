"""Concepts that act on one another: a style of a thing, and a thing that wears another one.

Three concepts are learned one after another: a dog, a drawing style and a hat. The prompts then ask for
`<chalk> of <rex>` and for `<rex> wearing <cap>`. Real pictures of both are drawn from the definitions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...core.bank.bank import ConceptBank
from ...core.bank.format import open_bank, save_bank
from ...core.data.framing import Framing
from ...core.data.pictures import Picture
from ...core.data.training_set import prepare
from ...core.demo import scenes
from ...core.demo.base import load_base
from ...core.demo.bases import file_of
from ...core.demo.judges import PLACES, SIDE, SceneEncoder, assignment_of, to_tensor
from ...core.demo.render import EMPTY, Style, render, role_map
from ...core.demo.scenes import Placed, SceneConcept, Thing
from ...core.evaluation.metrics import image_alignment
from ...core.hosts.diffusers import DiffusersBackbone
from ...core.methods.base import Task, make
from ...core.sampling.sampling import sample
from ...core.training.loop import learn
from ..report import load_or_make, write_result
from ..sheet import save_sheet
from . import embedded
from .tables import share
from .template_judge import matched

# Without his scarf: a drawn thing has one accessory.
REX = SceneConcept("rex", "dog", "object", replace(scenes.CONCEPTS["rex"].thing, accessory="none"))
CHALK = scenes.CONCEPTS["chalk"]
CAP, CAP_COLOUR = "cap", (96, 70, 230)      # a violet blue, which no caption of the base names
WEARERS = ("cat", "robot", "teddy bear", "dog", "duck toy")
PHOTOS, REAL, REAL_SEED = 5, 24, 93_000
SHOWN = 4      # pictures of a composition in the table


@dataclass(frozen=True)
class Composition:
    """prompts: of the concepts; noun_prompts: of their class nouns; real, reference: different real pictures
    `[N, 3, H, W]` in -1..1; kinds: of the features that are compared; others: real ones with other hats."""

    prompts: tuple[str, ...]
    noun_prompts: tuple[str, ...]
    real: Tensor
    reference: Tensor
    kinds: tuple[str, ...]
    others: Tensor | None = None


def wearing(thing: Thing, colour: tuple[int, int, int] = CAP_COLOUR) -> Thing:
    return replace(thing, accessory="hat", accessory_colour=colour)


def cap_photos(side: int) -> list[Picture]:
    """Photos of random things that wear the cap."""
    rng, photos = random.Random(5), []
    for kind in WEARERS[:PHOTOS]:
        thing = scenes.random_thing(rng, kind)
        scene = scenes.random_scene(rng, (wearing(thing),), "photo")
        text = scenes.describe(replace(thing, accessory="none"), rng)
        photos.append(Picture(to_tensor([render(scene, side)])[0],
                              f"a photo of {text} wearing <{CAP}> {scenes.background_phrase(scene)}"))
    return photos


def _drawn(things: Sequence[Thing], style: Style | str, seed: int, side: int) -> Tensor:
    """Real pictures of things, taken in turn."""
    rng = random.Random(seed)
    return to_tensor([render(scenes.random_scene(rng, (things[i % len(things)],), style), side)
                      for i in range(REAL)])


def compositions(side: int) -> dict[str, Composition]:
    """Name -> composition, with pictures of `side` pixels."""
    worn = [wearing(REX.thing)]
    other_hats = [wearing(REX.thing, colour) for colour in scenes.PALETTE.values()]
    return {
        "style_of_thing": Composition(
            ("<chalk> of <rex>",), (f"a {CHALK.class_noun} of a {REX.class_noun}",),
            _drawn([REX.thing], CHALK.style, REAL_SEED, side),
            _drawn([REX.thing], CHALK.style, REAL_SEED + 1, side), ("object", "style")),
        "thing_wearing": Composition(
            tuple(f"a photo of <rex> wearing <{CAP}> {place}" for place in PLACES),
            tuple(f"a photo of a {REX.class_noun} wearing a hat {place}" for place in PLACES),
            _drawn(worn, "photo", REAL_SEED + 2, side), _drawn(worn, "photo", REAL_SEED + 3, side),
            ("object",), _drawn(other_hats, "photo", REAL_SEED + 4, side)),
    }


def cap_worn(images: Tensor) -> float:
    """Share of the cap's places on the dog that have its colour, mean over pictures `[B, 3, H, W]`.

    By the judge without learned weights. The dog with the cap has the dog's places and the cap's, so what the
    first drawing matches beyond the second is the cap. It is approximate, because the cap hides a part of the
    head. `summary` therefore gives it between real pictures with other hats (0) and with the cap (1).
    """
    worn, bare = wearing(REX.thing), REX.thing
    maps = [role_map(Placed(thing, 0.5, 0.5, 0.6), 3 * SIDE) for thing in (worn, bare)]
    counts = [int((drawn != EMPTY).sum()) for drawn in maps]
    cap = 1 - counts[1] / counts[0]
    return float(((matched(worn, images) - (1 - cap) * matched(bare, images)) / cap).mean())


def learned(backbone: DiffusersBackbone, method: str, steps: int, seed: int, file: Path) -> ConceptBank:
    """The bank with dog, style and cap, learned once and kept in a file."""
    if not file.exists():
        side, bank = backbone.picture_size, ConceptBank(backbone.layout)
        todo = [(c.name, c.class_noun, c.kind, assignment_of(c, PHOTOS, size=side).pictures)
                for c in (REX, CHALK)]
        for name, noun, kind, photos in [*todo, (CAP, "hat", "object", cap_photos(side))]:
            config = embedded.training(steps, seed, side)
            data = prepare(backbone, photos, name, noun,
                           Framing(config.resolution, config.framing, config.flip))
            task = Task(name, noun, backbone, bank, kind, generator=torch.Generator().manual_seed(seed))
            given = embedded.settings_of_kind(method, backbone.fingerprint, kind)
            bank = learn(task, make(method, given), data, config).bank
        file.parent.mkdir(parents=True, exist_ok=True)
        save_bank(bank, file)
    return open_bank(file)


def _sampled(backbone: DiffusersBackbone, bank: ConceptBank, texts: Sequence[str],
             count: int = len(embedded.SEEDS)) -> Tensor:
    side, seeds = backbone.picture_size, embedded.SEEDS[:count]
    prompts = [texts[i % len(texts)] for i in range(len(seeds))]
    return sample(backbone, bank, prompts, seeds, replace(embedded.SETTINGS, size=(side, side))).cpu()


def scores(images: Tensor, composition: Composition) -> dict[str, float]:
    """Mean cosine with the reference pictures, by kind of features."""
    encoder, reference = SceneEncoder(), composition.reference
    return {kind: image_alignment(encoder.features(images, kind), encoder.features(reference, kind))
            for kind in composition.kinds}


def figures(images: Tensor, composition: Composition) -> dict[str, float]:
    """Scores of pictures; where the cap is asked for, also how much of it is worn."""
    worn = {} if composition.others is None else {"cap": cap_worn(images)}
    return scores(images, composition) | worn


def limits(backbone: DiffusersBackbone) -> dict:
    """By composition: figures of class nouns (`floor`) and of real pictures (`ceiling`). The floor of the cap
    is that of real pictures with other hats."""
    empty, found = ConceptBank(backbone.layout), {}
    for name, one in compositions(backbone.picture_size).items():
        floor = figures(_sampled(backbone, empty, one.noun_prompts), one)
        if one.others is not None:
            floor["cap"] = cap_worn(one.others)
        found[name] = {"floor": floor, "ceiling": figures(one.real, one)}
    return found


def measure(backbone: DiffusersBackbone, bank: ConceptBank) -> dict:
    """By composition: figures of what the bank draws."""
    return {name: figures(_sampled(backbone, bank, one.prompts), one)
            for name, one in compositions(backbone.picture_size).items()}


def summary(runs: Sequence[dict], limits: dict) -> dict:
    """Means over runs, as share of the way from floor (0) to ceiling (1)."""
    return {name: {figure: share(sum(run[name][figure] for run in runs) / len(runs), floor,
                                 bounds["ceiling"][figure])
                   for figure, floor in bounds["floor"].items()}
            for name, bounds in limits.items()}


def draw_sheet(backbone: DiffusersBackbone, banks: Sequence[ConceptBank], file: Path) -> None:
    """A line of real pictures, one of the class nouns, and one for each bank: first the style of the dog,
    then the dog with the cap."""
    both = compositions(backbone.picture_size).values()
    empty = ConceptBank(backbone.layout)
    rows = [*(one.real[:SHOWN] for one in both),
            *(_sampled(backbone, empty, one.noun_prompts, SHOWN) for one in both),
            *(_sampled(backbone, bank, one.prompts, SHOWN) for bank in banks for one in both)]
    save_sheet(torch.cat(rows), file, 2 * SHOWN)


def compose(methods: Sequence[str], seeds: Sequence[int], steps: int, file: Path, folder: Path,
            base_name: str, tell: Callable[[str], object] = lambda _: None) -> dict:
    """Performs the missing runs, one per method and seed, and writes the result.

    Args:
        methods, seeds: What is compared, and seeds of the learning.
        steps: Of learning each concept.
        file: The result; a table of pictures of the first seed goes beside it.
        folder: Folder of the runs.
        base_name: Name of the embedded base.
        tell: Reports a finished run.
    """
    backbone = load_base(file_of(base_name))
    folder /= backbone.fingerprint[:12]
    bounds = load_or_make(folder / "limits.json", lambda: limits(backbone))
    methods_found, first = {}, []
    for method in methods:
        runs = []
        for seed in seeds:
            bank = learned(backbone, method, steps, seed, folder / f"{method}-n{steps}-s{seed}.safetensors")
            runs.append(load_or_make(folder / f"{method}-n{steps}-s{seed}.json",
                                     lambda bank=bank: measure(backbone, bank)))
            first += [bank] if seed == seeds[0] else []
            tell(f"{method}, seed {seed}: finished")
        methods_found[method] = {**summary(runs, bounds), "runs": runs,
                                 "settings": embedded.settings_of(method, backbone.fingerprint)}
    result = {"steps": steps, "seeds": list(seeds), "pictures": len(embedded.SEEDS),
              "base": backbone.fingerprint, "limits": bounds, "methods": methods_found}
    write_result(file, result)
    draw_sheet(backbone, first, file.with_suffix(".png"))
    return result


def lines_of(result: dict) -> list[str]:
    """The result as a table."""
    columns = [(name, figure) for name, bounds in result["limits"].items() for figure in bounds["floor"]]
    heads = [f"{name.replace('_', ' ')}: {figure}" for name, figure in columns]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    for method, found in result["methods"].items():
        values = " | ".join(f"{found[name][figure]:.2f}" for name, figure in columns)
        lines.append(f"| {method} | {values} |")
    return lines

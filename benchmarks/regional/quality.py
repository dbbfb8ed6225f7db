"""`bench regional`, quality: K concepts in K regions on the embedded base, by all ways of regional_rivals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path

import torch
from torch import Tensor

from ...core.bank.bank import ConceptBank
from ...core.bank.format import open_bank, save_bank
from ...core.data.framing import Framing
from ...core.data.training_set import prepare
from ...core.demo.judges import PLACES, SceneEncoder, assignment_of
from ...core.methods.base import Task, make
from ...core.model.backbone import Backbone
from ...core.training.loop import learn
from ..continual import prompt_suite
from ..continual.concepts import concepts
from ..continual.embedded import SEEDS, SETTINGS, settings_of, training
from .rivals import WAYS, Box, Wish

NAMES = ("rex", "quack", "mimi", "pack", "teddy", "fido")      # the last is the second dog
GRIDS = {1: (1, 1), 2: (1, 2), 3: (1, 3), 4: (1, 4), 5: (1, 5), 6: (2, 3)}      # rows and columns; a region is as large as a picture
SIDE, STEPS, PHOTOS, BATCH = 64, 600, 10, 8
RANKS = {"bound": 16, "cidm": 4}      # deltas that act at two words alone have room for more; with 8 CIDM's concepts bleed more
UNPLACED = ("prompt", "found")      # ways that are not told who is to be where
OF_LORA = ("masked", "hooks", "couple")      # ways of files that are LoRA: they get concepts whose deltas act on every word, CIDM's


def method_of(way: str) -> str:
    """Whose concepts a way draws."""
    return "cidm" if way in OF_LORA else "bound"


@dataclass(frozen=True)
class Judge:
    """Who is to be seen: features of real pictures, and how near to them a picture must come (halfway from class noun to real)."""

    encoder: SceneEncoder
    references: dict[str, Tensor]
    levels: dict[str, float]

    def scores(self, pictures: Tensor, boxes: Sequence[Box], names: Sequence[str]) -> Tensor:
        """`[B, regions, names]`: how like each concept a region is."""
        height, width = pictures.shape[-2:]
        seen = []
        for box in boxes:
            top, left, bottom, right = (round(f * side) for f, side in zip(box, (height, width, height, width), strict=True))
            found = self.encoder.features(pictures[..., top:bottom, left:right].contiguous(), "object")
            seen.append(torch.stack([(found @ self.references[name].T).mean(1) for name in names], dim=1))
        return torch.stack(seen, dim=1)


def judge(backbone: Backbone) -> Judge:
    encoder, tasks = SceneEncoder(), _tasks()
    noun, _, real = prompt_suite.levels(backbone, tasks, encoder, SETTINGS, SEEDS)
    references = {task.name: encoder.features(task.references, "object") for task in tasks}
    return Judge(encoder, references, prompt_suite.halfway(noun, real))


def _tasks(photos: int = 5) -> list:
    return [assignment_of(concept, photos, seed=7 + i) for i, concept in enumerate(concepts(10)) if concept.name in NAMES]


def bank_name(method: str, steps: int) -> str:
    """How a bank was learned, for the names of files that depend on it."""
    return f"r{RANKS[method]}-s{steps}-b{BATCH}-p{PHOTOS}"


def learned_bank(backbone: Backbone, method: str, file: Path, steps: int, tell: Callable[[str], object]) -> ConceptBank:
    """The concepts learned one after another, kept in a file after each: a run that was cut goes on."""
    bank = open_bank(file) if file.exists() else ConceptBank(backbone.layout)
    config = replace(training(steps, 0), batch_size=BATCH)
    for task in _tasks(PHOTOS):
        if task.name in bank:
            continue
        data = prepare(backbone, list(task.pictures), task.name, task.class_noun, Framing(config.resolution, config.framing, config.flip))
        one = Task(task.name, task.class_noun, backbone, bank, task.kind, (), torch.Generator().manual_seed(0))
        bank = learn(one, make(method, settings_of(method) | {"rank": RANKS[method]}), data, config).bank
        file.parent.mkdir(parents=True, exist_ok=True)
        save_bank(bank, file)
        tell(f"{method}: learned <{task.name}>")
    return bank


def boxes_of(count: int) -> tuple[Box, ...]:
    rows, columns = GRIDS[count]
    return tuple((r / rows, c / columns, (r + 1) / rows, (c + 1) / columns) for r in range(rows) for c in range(columns))


def wishes(count: int, pictures: int) -> list[Wish]:
    """`pictures` pictures of `count` concepts: who stands where and the place change, the seed too."""
    rows, columns = GRIDS[count]
    settings = replace(SETTINGS, size=(SIDE * rows, SIDE * columns))
    found = []
    for i in range(pictures):
        names = tuple(NAMES[(i + j) % len(NAMES)] for j in range(count))
        found.append(Wish(names, boxes_of(count), PLACES[i % 4], (500 + i,), settings))
    return found


@dataclass(frozen=True)
class Seen:
    """Of one picture's regions, all `[K]`: the concept that is there, its number among the wished ones, -1 for nobody; hit, missing."""

    shown: Tensor
    hit: Tensor
    missing: Tensor


def seen_in(scores: Tensor, levels: Tensor, is_placed: bool) -> Seen:
    """scores `[K, K]` of regions and concepts; levels `[K]`. Where places were not asked for, concepts get the regions that fit best."""
    count = len(levels)
    if not is_placed:
        ways = torch.tensor(list(permutations(range(count))))
        scores = scores[ways[scores[ways, torch.arange(count)].sum(1).argmax()]]
    nearest = scores.argmax(1)
    shown = torch.where(scores.gather(1, nearest.unsqueeze(1)).squeeze(1) > levels[nearest], nearest, -1)
    own = torch.arange(count)
    return Seen(shown, shown == own, ~(shown.unsqueeze(1) == own).any(0))


def border_gradient(pictures: Tensor, boxes: Sequence[Box]) -> float:
    """How much larger steps from one pixel to the next are across the regions' inner borders than elsewhere; 1 = no border to be seen."""
    height, width = pictures.shape[-2:]
    columns = sorted({round(f * width) for box in boxes for f in (box[1], box[3])} - {0, width})
    rows = sorted({round(f * height) for box in boxes for f in (box[0], box[2])} - {0, height})
    across, along = (pictures.diff(dim=dim).abs().mean((0, 1)) for dim in (3, 2))      # `[H, W - 1]`, `[H - 1, W]`
    at = torch.cat([across[:, [c - 1 for c in columns]].flatten(), along[[r - 1 for r in rows]].flatten()])
    return float(at.mean() / torch.cat([across.flatten(), along.flatten()]).mean()) if len(at) else 1.0


@torch.no_grad()
def quality(backbone: Backbone, bank: ConceptBank, judge: Judge, way: str, count: int, pictures: int) -> dict:
    """Figures of one way with `count` regions. bleed: share of regions that show another of the wished concepts, per other concept; matrix:
    the same, by who was meant and who is there; missing: share of wished concepts that no region shows."""
    hits, missing, borders = [], [], []
    shown, meant = torch.zeros(len(NAMES), len(NAMES)), torch.zeros(len(NAMES), len(NAMES))
    for wish in wishes(count, pictures):
        picture = WAYS[way](backbone, bank, wish)
        levels = torch.tensor([judge.levels[name] for name in wish.names])
        found = seen_in(judge.scores(picture, wish.boxes, wish.names)[0], levels, way not in UNPLACED)
        hits.append(found.hit.float().mean())
        missing.append(found.missing.float().mean())
        borders.append(border_gradient(picture, wish.boxes))
        numbers = [NAMES.index(name) for name in wish.names]
        for i, own in enumerate(numbers):
            meant[own, numbers] += 1
            if found.shown[i] >= 0:
                shown[own, numbers[int(found.shown[i])]] += 1
    matrix, others = shown / meant.clamp(min=1), ~torch.eye(len(NAMES), dtype=torch.bool)
    bleed = float(shown[others].sum() / meant[others].sum().clamp(min=1))
    return {"hit_rate": float(torch.stack(hits).mean()), "bleed": bleed, "missing": float(torch.stack(missing).mean()),
            "border": sum(borders) / len(borders), "pictures": pictures, "steps": SETTINGS.steps, "rank": RANKS[method_of(way)],
            "photos": PHOTOS, "matrix": [[round(x, 4) for x in row] for row in matrix.tolist()]}

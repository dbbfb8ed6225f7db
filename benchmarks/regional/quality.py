"""Quality of regions: K concepts in K regions on the embedded base, sampled in all ways of `rivals`."""

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
from ...core.demo.bases import NEWEST, picture_size
from ...core.demo.judges import PLACES, SceneEncoder, assignment_of
from ...core.methods.base import Task, make
from ...core.model.backbone import Backbone
from ...core.regional.regions import Box
from ...core.sampling.sampling import sample
from ...core.training.loop import learn
from ..continual.concepts import concepts
from ..continual.embedded import RATES, SETTINGS, training
from ..continual.judges import EncoderJudge
from .rivals import WAYS, Request

NAMES = ("rex", "quack", "mimi", "pack", "teddy", "fido")      # the last one is a second dog
# rows and columns; a region has the size of a training picture
GRIDS = {1: (1, 1), 2: (1, 2), 3: (1, 3), 4: (1, 4), 5: (1, 5), 6: (2, 3)}
SIDE, STEPS, PHOTOS, BATCH = picture_size(), 600, 10, 8
SEEDS = tuple(range(100, 108))      # pictures of each class noun
RANKS = {"bound": 16, "cidm": 4}      # word-bound deltas allow a higher rank; at rank 8, CIDM's bleed more
UNPLACED = ("prompt", "found")      # ways without given positions
OF_LORA = ("masked", "hooks", "couple")      # ways with LoRA files: CIDM's concepts, deltas on every word


def method_of(way: str) -> str:
    """The method whose concepts a way uses."""
    return "cidm" if way in OF_LORA else "bound"


@dataclass(frozen=True)
class Judge:
    """Recognises concepts.

    Args:
        encoder: Encoder of pictures.
        references: Concept -> features of real pictures `[R, F]`.
        levels: Concept -> required similarity to the references: halfway between class noun and real
            pictures.
    """

    encoder: SceneEncoder
    references: dict[str, Tensor]
    levels: dict[str, float]

    def scores(self, pictures: Tensor, boxes: Sequence[Box], names: Sequence[str]) -> Tensor:
        """Similarity of each region to each concept, `[B, regions, names]`, for pictures `[B, 3, H, W]`."""
        height, width = pictures.shape[-2:]
        regions = []
        for box in boxes:
            sides = zip(box, (height, width, height, width), strict=True)
            top, left, bottom, right = (round(fraction * side) for fraction, side in sides)
            features = self.encoder.features(pictures[..., top:bottom, left:right].contiguous(), "object")
            scores = [(features @ self.references[name].T).mean(1) for name in names]
            regions.append(torch.stack(scores, dim=1))
        return torch.stack(regions, dim=1)


def judge(backbone: Backbone) -> Judge:
    encoder, tasks = SceneEncoder(), _tasks()
    by_encoder, levels = EncoderJudge(encoder, tasks), {}
    settings = replace(SETTINGS, size=(SIDE, SIDE))
    for task in tasks:
        prompts = [task.noun_prompts[i % len(task.noun_prompts)] for i in range(len(SEEDS))]
        drawn = sample(backbone, ConceptBank(backbone.layout), prompts, SEEDS, settings)
        noun, real = (float(by_encoder.scores(pictures, [task.name]).mean())
                      for pictures in (drawn, task.held_out))
        levels[task.name] = (noun + real) / 2
    return Judge(encoder, {task.name: by_encoder.features_of(task.name) for task in tasks}, levels)


def _tasks(photos: int = 5) -> list:
    return [assignment_of(concept, photos, 7 + i, SIDE) for i, concept in enumerate(concepts(10))
            if concept.name in NAMES]


def bank_name(method: str, steps: int) -> str:
    """Description of a bank's training for file names. Those of the first base name no base."""
    base = "" if NEWEST == "embedded-64" else f"{NEWEST}-"
    return f"{base}r{RANKS[method]}-s{steps}-b{BATCH}-p{PHOTOS}"


def learned_bank(backbone: Backbone, method: str, file: Path, steps: int,
                 tell: Callable[[str], object]) -> ConceptBank:
    """Learns the concepts in sequence. The bank is saved after each one, so an interrupted run can resume."""
    bank = open_bank(file) if file.exists() else ConceptBank(backbone.layout)
    config = replace(training(steps, 0), batch_size=BATCH, resolution=SIDE)
    for task in _tasks(PHOTOS):
        if task.name in bank:
            continue
        framing = Framing(config.resolution, config.framing, config.flip)
        data = prepare(backbone, list(task.pictures), task.name, task.class_noun, framing)
        generator = torch.Generator().manual_seed(0)
        learning = Task(task.name, task.class_noun, backbone, bank, task.kind, (), generator)
        bank = learn(learning, make(method, {**RATES, "rank": RANKS[method]}), data, config).bank
        file.parent.mkdir(parents=True, exist_ok=True)
        save_bank(bank, file)
        tell(f"{method}: learned <{task.name}>")
    return bank


def boxes_of(count: int) -> tuple[Box, ...]:
    rows, columns = GRIDS[count]
    return tuple((row / rows, column / columns, (row + 1) / rows, (column + 1) / columns)
                 for row in range(rows) for column in range(columns))


def requests(count: int, pictures: int) -> list[Request]:
    """Requests of one picture each with `count` concepts. Positions, scene and seed vary."""
    rows, columns = GRIDS[count]
    settings = replace(SETTINGS, size=(SIDE * rows, SIDE * columns))
    names = [tuple(NAMES[(i + j) % len(NAMES)] for j in range(count)) for i in range(pictures)]
    return [Request(group, boxes_of(count), PLACES[i % 4], (500 + i,), settings)
            for i, group in enumerate(names)]


@dataclass(frozen=True)
class Recognised:
    """The recognised contents of one picture's regions, all `[K]`.

    Args:
        shown: Number of the concept shown by a region; -1 for none.
        hit: Whether a region shows its own concept.
        missing: Whether no region shows a concept.
    """

    shown: Tensor
    hit: Tensor
    missing: Tensor


def recognised(scores: Tensor, levels: Tensor, is_placed: bool) -> Recognised:
    """Recognises the concepts in regions.

    Args:
        scores: `[K, K]`, similarity of regions to concepts.
        levels: `[K]`, the score that a concept must exceed.
        is_placed: Whether positions were requested; otherwise concepts are optimally assigned to regions.
    """
    count = len(levels)
    if not is_placed:
        orders = torch.tensor(list(permutations(range(count))))
        scores = scores[orders[scores[orders, torch.arange(count)].sum(1).argmax()]]
    nearest = scores.argmax(1)
    is_above = scores.gather(1, nearest.unsqueeze(1)).squeeze(1) > levels[nearest]
    shown, numbers = torch.where(is_above, nearest, -1), torch.arange(count)
    return Recognised(shown, shown == numbers, ~(shown.unsqueeze(1) == numbers).any(0))


def border_gradient(pictures: Tensor, boxes: Sequence[Box]) -> float:
    """Ratio of differences between neighbouring pixels across inner borders of regions to those elsewhere; 1
    = no visible border.
    """
    height, width = pictures.shape[-2:]
    columns = sorted({round(f * width) for box in boxes for f in (box[1], box[3])} - {0, width})
    rows = sorted({round(f * height) for box in boxes for f in (box[0], box[2])} - {0, height})
    # `[H, W - 1]` and `[H - 1, W]`
    across, along = (pictures.diff(dim=dim).abs().mean((0, 1)) for dim in (3, 2))
    at = torch.cat([across[:, [c - 1 for c in columns]].flatten(), along[[r - 1 for r in rows]].flatten()])
    return float(at.mean() / torch.cat([across.flatten(), along.flatten()]).mean()) if len(at) else 1.0


@torch.no_grad()
def quality(backbone: Backbone, bank: ConceptBank, judge: Judge, way: str, count: int, pictures: int) -> dict:
    """Quality figures of one way with `count` regions.

    bleed: share of regions that show another requested concept, per other concept; matrix: shares by
    requested and shown concept; missing: share of requested concepts that no region shows.
    """
    hits, missing, borders = [], [], []
    shown, meant = torch.zeros(len(NAMES), len(NAMES)), torch.zeros(len(NAMES), len(NAMES))
    for request in requests(count, pictures):
        picture = WAYS[way](backbone, bank, request)
        levels = torch.tensor([judge.levels[name] for name in request.names])
        scores = judge.scores(picture, request.boxes, request.names)[0]
        result = recognised(scores, levels, way not in UNPLACED)
        hits.append(result.hit.float().mean())
        missing.append(result.missing.float().mean())
        borders.append(border_gradient(picture, request.boxes))
        numbers = [NAMES.index(name) for name in request.names]
        for i, number in enumerate(numbers):
            meant[number, numbers] += 1
            if result.shown[i] >= 0:
                shown[number, numbers[int(result.shown[i])]] += 1
    matrix, others = shown / meant.clamp(min=1), ~torch.eye(len(NAMES), dtype=torch.bool)
    bleed = float(shown[others].sum() / meant[others].sum().clamp(min=1))
    return {
        "hit_rate": float(torch.stack(hits).mean()), "bleed": bleed,
        "missing": float(torch.stack(missing).mean()), "border": sum(borders) / len(borders),
        "pictures": pictures, "steps": SETTINGS.steps,
        "rank": RANKS[method_of(way)], "photos": PHOTOS,
        "matrix": [[round(x, 4) for x in row] for row in matrix.tolist()],
    }

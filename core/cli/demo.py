"""The demo: three ways learn two dogs and a style one after another, and draw them alone and together."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..bank.format import open_bank
from ..bank.store import change_bank, saved_elsewhere
from ..data.assignment import Assignment
from ..data.report import counted
from ..demo.bases import file_of
from ..demo.judges import SceneEncoder
from ..errors import ConceptError
from ..evaluation import metrics
from ..evaluation.combined import assign_strips
from ..files import check_output, check_output_folder, write_atomically
from ..images import to_pil
from .demo_ways import (
    FIELDS,
    REGIONS,
    TASKS,
    WAYS,
    Pictures,
    Plan,
    banks_of,
    draw_job,
    learn_job,
    noun_job,
    parts_of,
    users_of,
)
from .workers import Workers

BANK = "bank.safetensors"
FILES = (BANK, "report.png", "report.json")
PHOTOS = "drawn-photos"
NOUNS = "class nouns"
STEPS_PER_DRAWING = 15      # steps of learning that take about as long as a job that draws
NEEDED = 5      # MB of temporary files; the banks of all ways take 2
PLAN = Plan()
BOXES = tuple(region.box for region in REGIONS if region.box is not None)


@dataclass(frozen=True)
class Levels:
    """Similarity to the photos, per concept: of pictures of the class noun, and of other real pictures."""

    noun: list[float]
    real: list[float]

    def middle(self, place: int) -> float:
        return (self.noun[place] + self.real[place]) / 2


def cut_out(pictures: Tensor, box: tuple[float, float, float, float]) -> Tensor:
    """Keeps a box of `[B, 3, H, W]` in place and repeats its border pixels over the rest."""
    height, width = pictures.shape[-2:]
    sides = (height, width, height, width)
    top, left, bottom, right = (round(fraction * side) for fraction, side in zip(box, sides, strict=True))
    return torch.nn.functional.pad(pictures[..., top:bottom, left:right],
                                   (left, width - right, top, height - bottom), mode="replicate")


def place_scores(pictures: Tensor, owners: list[Assignment], encoder: SceneEncoder) -> Tensor:
    """Similarity of what each of the `BOXES` shows to each concept, `[B, boxes, concepts]`."""
    features = [encoder.features(owner.references, owner.kind) for owner in owners]
    seen = [encoder.features(cut_out(pictures, box), "object") for box in BOXES]
    return torch.stack([torch.stack([(place @ own.T).mean(1) for own in features], dim=1) for place in seen],
                       dim=1)


def boxes_right(scores: Tensor, levels: list[float]) -> float:
    """Share of boxes that show their own individual, and that more than halfway to its photos.

    Args:
        scores: See `place_scores`; box i belongs to concept i.
        levels: Per concept, the similarity halfway from its class noun to its photos.
    """
    own = scores.diagonal(dim1=1, dim2=2)
    return float(((scores.argmax(2) == torch.arange(2)) & (own > torch.tensor(levels))).float().mean())


def pair_closed(scores: Tensor, levels: Levels) -> float:
    """How far the halves are on their way from class noun to photos, on average."""
    own = assign_strips(scores).alignment.mean(0).tolist()
    ways = [metrics.gap_closed(own[i], levels.noun[i], levels.real[i]) for i in range(2)]
    return sum(ways) / len(ways)


def _alignment(encoder: SceneEncoder, pictures: Tensor, task: Assignment) -> float:
    return metrics.image_alignment(encoder.features(pictures, task.kind),
                                   encoder.features(task.references, task.kind))


def figures_of(plan: Plan, pictures: Pictures, levels: Levels, encoder: SceneEncoder) -> dict:
    """The figures of one way, for the report."""
    tasks, objects = plan.tasks, list(plan.tasks[:2])
    ends = [_alignment(encoder, drawn, task) for drawn, task in zip(pictures.alone, tasks, strict=True)]
    firsts = [_alignment(encoder, drawn, tasks[0]) for drawn in pictures.first]
    middles = [levels.middle(i) for i in range(2)]
    pair, boxes = (place_scores(drawn, objects, encoder) for drawn in (pictures.pair, pictures.boxes))
    return {
        "gap_closed": [metrics.gap_closed(end, levels.noun[i], levels.real[i]) for i, end in enumerate(ends)],
        "first_concept": firsts,
        "retained": firsts[-1] / firsts[0],
        "pair_closed": pair_closed(pair, levels),
        "confused": float(assign_strips(pair).confused.float().mean()),
        "boxes_right": boxes_right(boxes, middles),
    }


def draw_all(plan: Plan, folder: Path, workers: int,
             ) -> tuple[dict[str, Pictures], list[Tensor], dict[str, float]]:
    """Every way learns and draws; jobs of one way do not wait for those of another.

    Returns:
        The pictures of every way; those of the class nouns; the seconds that each way's concepts took.
    """
    pool = Workers(workers, lambda: (plan.backbone, plan.tasks))
    seconds = dict.fromkeys(WAYS, 0.0)
    drawn: dict[str, dict[str, Any]] = {way: {} for way in WAYS}
    jobs = [(way, part) for way in WAYS for part in parts_of(way)]
    waiting = {user: sum(user in users_of(way, part) for way, part in jobs) for user in WAYS}

    def learned(users: dict[str, list[str]], took: dict[str, float]) -> None:
        for user, names in users.items():
            seconds[user] += sum(took[name] for name in names)
            waiting[user] -= 1
            if not waiting[user]:
                for field in FIELDS:
                    pool.start((user, field), draw_job, plan, user, field, folder)

    steps = plan.steps * sum(len(part) for _, part in jobs)
    total = steps + STEPS_PER_DRAWING * (len(WAYS) * len(FIELDS) + 1)
    with pool:
        for way, part in sorted(jobs, key=lambda job: -len(job[1])):      # the longest job first
            pool.start(users_of(way, part), learn_job, plan, way, part, folder)
        pool.start((NOUNS, ""), noun_job, plan)
        with tqdm(total=total, desc="learning and drawing") as bar:      # has a thread, so after the forks
            while pool.running:
                for purpose, result in pool.finished():
                    if isinstance(purpose, dict):
                        learned(purpose, result)
                    else:
                        drawn.setdefault(purpose[0], {})[purpose[1]] = result
                finished = pool.counter.value + STEPS_PER_DRAWING * sum(map(len, drawn.values()))
                bar.update(finished - int(bar.n))
    nouns = drawn.pop(NOUNS)[""]
    return {way: Pictures(**fields) for way, fields in drawn.items()}, nouns, seconds


def levels_of(plan: Plan, nouns: list[Tensor], encoder: SceneEncoder) -> Levels:
    pairs = list(zip(nouns, plan.tasks, strict=True))
    return Levels([_alignment(encoder, drawn, task) for drawn, task in pairs],
                  [_alignment(encoder, task.held_out, task) for _, task in pairs])


def _save_bank(output: Path, folder: Path) -> None:
    bank = banks_of("ours", folder)[-1]
    try:
        change_bank(output / BANK, lambda _: bank)      # an earlier bank stays as a version
    except ConceptError as error:
        raise saved_elsewhere(error, output / BANK, bank) from error


def _save_photos(folder: Path, tasks: Sequence[Assignment]) -> list[str]:
    """Writes the photos of each concept into a folder of its name, for the command `learn`. Files that are
    there stay as they are. Returns a note if some of them are other pictures."""
    kept = 0
    for task in tasks:
        for number, picture in enumerate(task.references, start=1):
            file, photo = folder / task.name / f"{number}.png", to_pil(picture)
            if not os.path.lexists(file):
                write_atomically(file, partial(photo.save, format="PNG"))
            elif not _shows(file, photo):
                kept += 1
    return [f"kept {counted(kept, 'file')} in '{folder}' with the names of this demo's photos but other "
            "contents; to get the photos, delete those files or choose another --output"] if kept else []


@contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")      # Pillow's, about files that are none of ours
        yield


def _shows(file: Path, photo: Image.Image) -> bool:
    """Whether a file holds this picture."""
    try:
        with _no_warnings(), Image.open(file) as stored:
            same_form = (stored.mode, stored.size) == (photo.mode, photo.size)
            return same_form and stored.tobytes() == photo.tobytes()
    except Exception:      # no picture, or a huge one; for damaged files Pillow raises errors of many kinds
        return False


def _check_room() -> None:
    """Raises ConceptError if the folder for temporary files cannot hold the banks of all ways."""
    try:
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free // 10**6
    except OSError as error:
        raise ConceptError("no folder for temporary files can be written; free some room, or set TMPDIR to "
                           f"a folder with {NEEDED} MB of room") from error
    if free < NEEDED:
        raise ConceptError(f"the folder for temporary files '{folder}' has room for {free} MB, and the demo "
                           f"needs {NEEDED} MB; free some room, or set TMPDIR to another folder")


def _check(output: Path, plan: Plan) -> None:
    """Checks all that a demo needs, before it begins. Raises ConceptError, see `run`."""
    if find_spec("matplotlib") is None:
        raise ConceptError("the demo draws its report with matplotlib, which is not installed; install it: "
                           "pip install matplotlib")
    file_of(plan.base)      # raises ConceptError for a base that is not there
    check_output_folder(output)
    for name in FILES:
        check_output(output / name, "demo's file")
    for task in plan.tasks:
        check_output_folder(output / PHOTOS / task.name)
    if (output / BANK).exists():
        stored = open_bank(output / BANK)      # one that cannot be read cannot be kept as a version either
        further = [f"<{name}>" for name in stored.names if name not in {task.name for task in plan.tasks}]
        if further:
            raise ConceptError(f"'{output / BANK}' holds {', '.join(further)}, which the demo would remove; "
                               "choose another --output")
    _check_room()


def run(output: Path, plan: Plan = PLAN, workers: int = 2,
        begins: Callable[[], object] = lambda: None) -> dict:
    """Writes report.png, report.json, bank.safetensors and the photos into `output`; returns the report.

    Args:
        output: A folder, made if it is missing.
        plan: How much to do, on which embedded base.
        workers: Number of processes; 1 = this one alone.
        begins: Called when all is checked, before the work.

    Raises:
        ConceptError: The base, matplotlib, memory or room for temporary files is missing, `output` cannot be
            written, or its bank cannot be read or holds other concepts.
    """
    from .demo_report import draw

    _check(output, plan)
    begins()
    began, encoder = time.perf_counter(), SceneEncoder()
    with tempfile.TemporaryDirectory(prefix="continual-concepts-demo-") as temporary:
        folder = Path(temporary)
        pictures, nouns, seconds = draw_all(plan, folder, workers)
        levels = levels_of(plan, nouns, encoder)
        output.mkdir(parents=True, exist_ok=True)
        _save_bank(output, folder)
    figures = {way: {"method": WAYS[way].method, **figures_of(plan, pictures[way], levels, encoder),
                     "seconds": seconds[way]} for way in WAYS}
    report = {"base": plan.base, "concepts": list(TASKS), "ways": figures, "steps": plan.steps,
              "class_noun_alignment": levels.noun, "held_out_alignment": levels.real,
              "seconds": time.perf_counter() - began}
    draw(output / "report.png", plan.tasks, figures, pictures)
    write_atomically(output / "report.json",
                     lambda temporary: temporary.write_text(json.dumps(report, indent=1) + "\n"))
    # last: nothing else is lost if it fails
    return {**report, "notes": _save_photos(output / PHOTOS, plan.tasks)}

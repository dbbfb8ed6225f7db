"""One cell of the continual benchmark: one method learns one sequence with one seed in one order, and everything is measured at the end.

A cell's progress is kept on disk after every task, so that a run that was cut goes on where it was; the figures are the same. What was made
with other steps or settings is refused and not mixed in.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ...core.bank.bank import ConceptBank
from ...core.bank.format import open_bank, save_bank
from ...core.data.assignment import Assignment
from ...core.data.framing import Framing, Picture
from ...core.data.training_set import prepare
from ...core.evaluation import metrics
from ...core.evaluation.protocol import Encoder, measure, words_for
from ...core.files import write_atomically
from ...core.methods.base import METHODS, Task, make
from ...core.model.backbone import Backbone
from ...core.model.deltas import Delta, SparseDelta
from ...core.sampling.sampling import sample
from ...core.sampling.settings import SampleSettings
from ...core.training.config import TrainingConfig
from ...core.training.loop import learn
from . import combined as multi
from .runs import Cell, Progress, check_same


@dataclass(frozen=True)
class Suite:
    """What all cells of a benchmark share.

    tasks: in the sequence's own order; groups: names of two or three concepts of different classes that prompts name together; pairs: the
    same for two of one class; together: prompts with one `{}` for the list of names; unrelated: prompts without concepts; seeds,
    group_seeds, pair_seeds: of the pictures per concept, per group and per pair; levels: concept -> IA halfway between its class noun's
    and real pictures;
    origin: what else the figures depend on (base, data, ...), as JSON values.
    """

    tasks: tuple[Assignment, ...]
    groups: tuple[tuple[str, ...], ...]
    pairs: tuple[tuple[str, ...], ...]
    together: tuple[str, ...]
    unrelated: tuple[str, ...]
    encoder: Encoder
    settings: SampleSettings
    seeds: tuple[int, ...]
    group_seeds: tuple[int, ...]
    pair_seeds: tuple[int, ...]
    levels: Mapping[str, float]
    unet_weights: int
    origin: Mapping = field(default_factory=dict)

    def named(self, name: str) -> Assignment:
        return next(task for task in self.tasks if task.name == name)


def _made_with(suite: Suite, cell: Cell, settings: Mapping, training: TrainingConfig) -> dict:
    sampling = {"sampling": cell.sampling()} if cell.sampling() else {}
    return {"steps": training.steps, "settings": dict(settings), **sampling, **suite.origin}


def _features(suite: Suite, task: Assignment, pictures: Tensor) -> Tensor:
    return suite.encoder.features(pictures, task.kind)


def _look(backbone: Backbone, bank: ConceptBank, suite: Suite, task: Assignment) -> tuple[Tensor, float, float]:
    """Features of a concept's pictures, their IA and TA. The pictures are let go: a thousand of 512 pixels are 3 GB."""
    pictures, ia, ta = measure(backbone, bank, task, task.prompts, suite.encoder, suite.settings, suite.seeds)
    return _features(suite, task, pictures), ia, ta


def prior_pictures(backbone: Backbone, suite: Suite, task: Assignment, count: int = 16) -> list[Picture]:
    """Prior-preservation pictures: the base's own pictures of the class noun, with those prompts as captions."""
    prompts = [task.noun_prompts[i % len(task.noun_prompts)] for i in range(count)]
    images = sample(backbone, ConceptBank(backbone.layout), prompts, list(range(9000, 9000 + count)), suite.settings)
    return [Picture(image, prompt, is_prior=True) for image, prompt in zip(images.cpu(), prompts, strict=True)]


def _learn(backbone: Backbone, suite: Suite, cell: Cell, task: Assignment, bank: ConceptBank, settings: Mapping, training: TrainingConfig,
           callback) -> tuple[ConceptBank, float]:
    own = list(task.pictures)
    if METHODS[cell.method].method.wants_prior:
        own += prior_pictures(backbone, suite, task)
    framing = Framing(training.resolution, training.framing, training.flip)
    data, began = prepare(backbone, own, task.name, task.class_noun, framing), time.perf_counter()
    generator = torch.Generator().manual_seed(training.seed)
    words = words_for(cell.method, task)
    learned = learn(Task(task.name, task.class_noun, backbone, bank, task.kind, words, generator), make(cell.method, settings), data,
                    training, callback)
    return learned.bank, time.perf_counter() - began


@dataclass(frozen=True)
class _Learned:
    """A bank that another look at the same learning has left, and its seconds per concept."""

    bank: ConceptBank
    seconds: float


def _learned_elsewhere(folder: Path, cell: Cell, names: list[str], made_with: Mapping) -> _Learned | None:
    """None where nobody has learned that sequence yet, or this cell is the one to learn it."""
    other = cell.learned_as()
    figures, bank = folder / f"{other.name}.json", folder / f"{other.name}.{len(names)}.safetensors"
    if other == cell or cell.alone or not (figures.exists() and bank.exists()):
        return None
    found, opened = json.loads(figures.read_text()), open_bank(bank)
    check_same(figures, found, {key: value for key, value in made_with.items() if key != "sampling"})
    check_same(bank, {"concepts": opened.names}, {"concepts": names})
    return _Learned(opened, found["seconds_per_concept"])


def learn_sequence(backbone: Backbone, suite: Suite, cell: Cell, places: list[int], settings: Mapping, training: TrainingConfig,
                   folder: Path, progress: Callable[[str], object] = lambda _: None) -> tuple[Progress, ConceptBank]:
    """Learns what is still to learn. The bank file's name says how many concepts it holds, so progress and bank never disagree."""
    path, made_with = folder / f"{cell.name}.progress.json", _made_with(suite, cell, settings, training)
    known = Progress.load(path, made_with)
    ready = _learned_elsewhere(folder, cell, [suite.tasks[place].name for place in places], made_with)

    def file(count: int) -> Path:
        return folder / f"{cell.name}.{count}.safetensors"

    if ready is not None:
        bank = ready.bank.first(len(known.names))
    else:
        bank = open_bank(file(len(known.names))) if known.names else ConceptBank(backbone.layout)
    for place in places[len(known.names):]:
        task = suite.tasks[place]
        start = ConceptBank(backbone.layout) if cell.alone else bank
        if ready is not None:
            grown, seconds = ready.bank.first(len(known.names) + 1), ready.seconds
        else:
            grown, seconds = _learn(backbone, suite, cell, task, start, settings, training, progress(task.name))
        features, ia, ta = _look(backbone, grown, suite, task)
        bank = bank.add(grown[task.name]) if cell.alone else grown
        known.names.append(task.name)
        known.just.append((ia, ta))
        known.features.append([[round(x, 5) for x in row] for row in features.tolist()])
        known.seconds.append(seconds)
        known.bytes.append(grown[task.name].nbytes())
        if ready is None:
            save_bank(bank, file(len(known.names)))
        known.save(path)
        file(len(known.names) - 1).unlink(missing_ok=True)
    return known, bank


def _together(backbone: Backbone, bank: ConceptBank, suite: Suite, group: tuple[str, ...], seeds: tuple[int, ...]) -> multi.Together:
    listed = ", ".join(f"<{name}>" for name in group[:-1]) + f" and <{group[-1]}>"
    prompts = [suite.together[i % len(suite.together)].format(listed) for i in range(len(seeds))]
    pictures = sample(backbone, bank, prompts, seeds, suite.settings)
    references = [suite.encoder.features(suite.named(name).references, "object") for name in group]
    scores = multi.similarities(pictures, references, lambda images: suite.encoder.features(images, "object"))
    return multi.together(scores, [suite.levels[name] for name in group])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _group_figures(backbone: Backbone, bank: ConceptBank, suite: Suite) -> dict:
    groups = [_together(backbone, bank, suite, group, suite.group_seeds) for group in suite.groups if all(name in bank for name in group)]
    if not groups:
        return {}
    return {"multi_alignment": _mean([float(found.alignment.mean()) for found in groups]),
            "multi_present": _mean([float(found.present.float().mean()) for found in groups])}


def _pairs(suite: Suite, names: Container[str]) -> list[tuple[str, ...]]:
    return [pair for pair in suite.pairs if all(name in names for name in pair)]


def _pair_figures(backbone: Backbone, bank: ConceptBank, suite: Suite) -> dict:
    """Two of one class in a picture. Who is mistaken for whom is a matter of yes or no: it takes many pictures until methods can be told
    apart, so how many there were is one of the figures."""
    pairs = [_together(backbone, bank, suite, pair, suite.pair_seeds) for pair in _pairs(suite, bank)]
    if not pairs:
        return {}
    return {"pair_alignment": _mean([float(found.alignment.mean()) for found in pairs]),
            "confusion": _mean([float(found.mistaken.float().mean()) for found in pairs]),
            "pair_pictures": len(pairs) * len(suite.pair_seeds)}


def _known(backbone: Backbone, suite: Suite, cell: Cell, found: dict, folder: Path) -> dict | None:
    """The figures of a finished cell. With another number of pictures of pairs than asked for now these are made again from its bank;
    None where that is gone."""
    names = found["concepts"]
    if cell.alone or found.get("pair_pictures", 0) == len(_pairs(suite, names)) * len(suite.pair_seeds):
        return found
    banks = (folder / f"{one.name}.{len(names)}.safetensors" for one in (cell, cell.learned_as()))
    bank = next((path for path in banks if path.exists()), None)
    return None if bank is None else found | _pair_figures(backbone, open_bank(bank), suite)


def _drift(backbone: Backbone, bank: ConceptBank, suite: Suite) -> float:
    seeds = list(range(7000, 7000 + len(suite.unrelated)))
    before, after = (sample(backbone, b, suite.unrelated, seeds, suite.settings) for b in (ConceptBank(backbone.layout), bank))
    return metrics.drift(before, after)


def _write(path: Path, result: dict) -> None:
    text = json.dumps(result, indent=1) + "\n"
    if not path.exists() or path.read_text() != text:
        write_atomically(path, lambda temporary: temporary.write_text(text))


def run_cell(backbone: Backbone, suite: Suite, cell: Cell, places: list[int], settings: Mapping, training: TrainingConfig, folder: Path,
             progress: Callable[[str], object] = lambda _: None) -> dict:
    """All figures of one cell; from its file when it has been run before. Raises ConceptError for a file of other steps or settings."""
    path, made_with = folder / f"{cell.name}.json", _made_with(suite, cell, settings, training)
    suite = replace(suite, settings=replace(suite.settings, **cell.sampling()))
    if path.exists():
        found = json.loads(path.read_text())
        check_same(path, found, made_with)
        finished = _known(backbone, suite, cell, found, folder)
        if finished is not None:
            _write(path, finished)
            return finished
    folder.mkdir(parents=True, exist_ok=True)
    known, bank = learn_sequence(backbone, suite, cell, places, settings, training, folder, progress)
    tasks = [suite.named(name) for name in known.names]
    seen = {name: ConceptBank(backbone.layout).add(bank[name]) if cell.alone else bank for name in known.names}
    final = [_look(backbone, seen[task.name], suite, task) for task in tasks]
    result = {**asdict(cell), "method": cell.label, **made_with, "concepts": known.names}
    result |= _figures(suite, known, tasks, final)
    result["base_drift"] = _drift(backbone, bank, suite)
    if not cell.alone:
        result |= _group_figures(backbone, bank, suite) | _pair_figures(backbone, bank, suite)
    result |= _costs(suite, known, bank)
    _write(path, result)
    (folder / f"{cell.name}.progress.json").unlink(missing_ok=True)
    return result


def _figures(suite: Suite, known: Progress, tasks: list[Assignment], final: list[tuple[Tensor, float, float]]) -> dict:
    """Single-concept figures, in learning order."""
    just, last = [ia for ia, _ in known.just], [ia for _, ia, _ in final]
    features = [found for found, _, _ in final]
    real = [_features(suite, task, task.references) for task in tasks]
    first = [torch.tensor(rows) for rows in known.features]
    of_kind = [i for i, task in enumerate(tasks) if task.kind == "object"]
    return {
        "just_learned": just,
        "image_alignment": last,
        "text_alignment": [ta for _, _, ta in final],
        "retention": [b / a for a, b in zip(just, last, strict=True)],
        "forgetting": [a - b for a, b in zip(just, last, strict=True)],
        "a_mmd": metrics.a_mmd(real, features),
        "f_mmd": metrics.f_mmd(first, features),
        "bleed": metrics.bleed([features[i] for i in of_kind], [real[i] for i in of_kind]).tolist(),
    }


def _weights(delta: Delta) -> int:
    """Numbers that a delta changes or is made of; places are not counted."""
    return delta.values.numel() if isinstance(delta, SparseDelta) else delta.up.numel() + delta.down.numel()


def _costs(suite: Suite, known: Progress, bank: ConceptBank) -> dict:
    shared = sum(tensor.numel() * tensor.element_size() for state in bank.shared.values() for tensor in state.values())
    stored = sum(_weights(delta) for concept in bank for delta in concept.deltas.values())
    return {
        "seconds_per_concept": _mean(known.seconds),
        "bytes_per_concept": (sum(known.bytes) + shared) / len(bank),
        "trained_share": stored / len(bank) / suite.unet_weights,
    }

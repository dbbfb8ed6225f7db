"""One run of the continual benchmark: a method learns a sequence with one seed and order, and is evaluated at
the end.

Progress is saved after every task. An interrupted run resumes and gives the same figures. Files made with
other steps or settings raise an error.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ...core.bank.bank import ConceptBank
from ...core.bank.format import open_bank, save_bank
from ...core.data.assignment import Assignment
from ...core.data.framing import Framing
from ...core.data.pictures import Picture
from ...core.data.training_set import prepare
from ...core.errors import ConceptError
from ...core.evaluation.protocol import words_for
from ...core.files import write_atomically
from ...core.methods.base import METHODS, Task, make
from ...core.model.backbone import Backbone
from ...core.training.config import TrainingConfig
from ...core.training.loop import learn
from .evaluation import cost_figures, final_figures, just_learned, pair_pictures, with_other_pairs
from .pictures import Sampler
from .prompt_suite import PromptSuite
from .runs import Progress, Run, check_same, settings_for

FIRST_PRIOR_SEED = 9000


class LearningError(ConceptError):
    """A concept could not be learned with these settings, for example because training diverged."""


def _made_with(suite: PromptSuite, run: Run, settings: Mapping, training: TrainingConfig) -> dict:
    sampling = {"sampling": run.sampling()} if run.sampling() else {}
    return {"steps": training.steps, "settings": dict(settings), **sampling, **suite.origin}


def prior_pictures(sampler: Sampler, suite: PromptSuite, task: Assignment,
                   count: int = 16) -> list[Picture]:
    """Prior-preservation pictures: pictures of the class noun sampled from the base, with their prompts as
    captions.
    """
    prompts = [task.noun_prompts[i % len(task.noun_prompts)] for i in range(count)]
    seeds = list(range(FIRST_PRIOR_SEED, FIRST_PRIOR_SEED + count))
    images = sampler.sample(ConceptBank(sampler.backbone.layout), prompts, seeds, suite.settings)
    return [Picture(image, prompt, is_prior=True)
            for image, prompt in zip(images.cpu(), prompts, strict=True)]


def _seconds(backbone: Backbone) -> float:
    """A clock of the work: on the CPU the processor's seconds, which other load hardly changes."""
    return time.process_time() if backbone.device.type == "cpu" else time.perf_counter()


def _learn(sampler: Sampler, suite: PromptSuite, run: Run, task: Assignment, bank: ConceptBank,
           settings: Mapping,
           training: TrainingConfig, callback) -> tuple[ConceptBank, float]:
    """Learns the task's concept. Returns the bank with the concept, and the training time in seconds."""
    backbone, pictures = sampler.backbone, list(task.pictures)
    if METHODS[run.method].method.wants_prior:
        pictures += prior_pictures(sampler, suite, task)
    framing = Framing(training.resolution, training.framing, training.flip)
    data, began = prepare(backbone, pictures, task.name, task.class_noun, framing), _seconds(backbone)
    generator = torch.Generator().manual_seed(training.seed)
    words = words_for(run.method, task)
    method = make(run.method, settings_for(settings, task.kind))
    task_to_learn = Task(task.name, task.class_noun, backbone, bank, task.kind, words, generator,
                         suite.encoder.image_text_features)
    try:
        learned = learn(task_to_learn, method, data, training, callback)
    except ConceptError as error:
        raise LearningError(f"{run.name}: {error}") from error
    return learned.bank, _seconds(backbone) - began


def _learned_elsewhere(folder: Path, run: Run, names: list[str], made_with: Mapping
                       ) -> tuple[ConceptBank, float] | None:
    """The bank of a finished run with the same training, and its seconds per concept.

    None if there is no such run.
    """
    other = run.learned_as()
    figures, bank = folder / f"{other.name}.json", folder / f"{other.name}.{len(names)}.safetensors"
    if other == run or run.alone or not (figures.exists() and bank.exists()):
        return None
    finished, opened = json.loads(figures.read_text()), open_bank(bank)
    check_same(figures, finished, {key: value for key, value in made_with.items() if key != "sampling"})
    check_same(bank, {"concepts": opened.names}, {"concepts": names})
    return opened, finished["seconds_per_concept"]


def learn_sequence(sampler: Sampler, suite: PromptSuite, run: Run, places: Sequence[int], settings: Mapping,
                   training: TrainingConfig, folder: Path,
                   callbacks: Callable[[str], object] = lambda _: None) -> tuple[Progress, ConceptBank]:
    """Learns the remaining tasks.

    The bank's file name contains the number of concepts, so that progress and bank always match.

    Args:
        sampler: Samples with the base.
        suite: Provides the tasks.
        run: Method, order and seed.
        places: Indices of the tasks in learning order.
        settings: Settings of the method, and STYLE_RATE.
        training: Training configuration, with the seed.
        folder: Folder of progress and bank.
        callbacks: Name of a concept -> step callback.
    """
    path, made_with = folder / f"{run.name}.progress.json", _made_with(suite, run, settings, training)
    progress, layout = Progress.load(path, made_with), sampler.backbone.layout
    ready = _learned_elsewhere(folder, run, [suite.tasks[place].name for place in places], made_with)

    def file(count: int) -> Path:
        return folder / f"{run.name}.{count}.safetensors"

    if ready is not None:
        bank = ready[0].first(len(progress.names))
    else:
        bank = open_bank(file(len(progress.names))) if progress.names else ConceptBank(layout)
    for place in places[len(progress.names):]:
        task = suite.tasks[place]
        if ready is not None:
            grown, seconds = ready[0].first(len(progress.names) + 1), ready[1]
        else:
            start = ConceptBank(layout) if run.alone else bank
            grown, seconds = _learn(sampler, suite, run, task, start, settings, training,
                                    callbacks(task.name))
        scores, features = just_learned(sampler, grown, suite, task)
        bank = bank.add(grown[task.name]) if run.alone else grown
        progress.names.append(task.name)
        progress.just.append(scores)
        progress.features.append(features)
        progress.seconds.append(seconds)
        progress.bytes.append(grown[task.name].nbytes())
        if ready is None:
            save_bank(bank, file(len(progress.names)))
        progress.save(path)
        file(len(progress.names) - 1).unlink(missing_ok=True)
    return progress, bank


def _up_to_date(sampler: Sampler, suite: PromptSuite, run: Run, finished: dict, folder: Path) -> dict | None:
    """The figures of a finished run.

    If the suite requests another number of pair pictures, they are sampled again from the run's bank. None if
    that bank is missing.
    """
    names = finished["concepts"]
    if run.alone or finished.get("pair_pictures", 0) == pair_pictures(suite, names):
        return finished
    banks = (folder / f"{other.name}.{len(names)}.safetensors" for other in (run, run.learned_as()))
    bank = next((path for path in banks if path.exists()), None)
    return None if bank is None else with_other_pairs(sampler, open_bank(bank), suite, finished)


def _write(path: Path, result: dict) -> None:
    text = json.dumps(result, indent=1) + "\n"
    if not path.exists() or path.read_text() != text:
        write_atomically(path, lambda temporary: temporary.write_text(text))


def finished_run(path: Path) -> dict | None:
    """The JSON of a finished run; None if there is no file.

    Raises:
        ConceptError: The file is no finished run, or an earlier version wrote it.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ConceptError(f"'{path}' is not a readable run ({error}); delete it to repeat it") from error
    if not isinstance(content, dict) or "method" not in content:
        raise ConceptError(f"'{path}' is JSON but not a finished run; move it out of the folder")
    return content


def perform(sampler: Sampler, suite: PromptSuite, run: Run, places: Sequence[int], settings: Mapping,
            training: TrainingConfig, folder: Path,
            callbacks: Callable[[str], object] = lambda _: None) -> dict:
    """Returns all figures of a run. A finished run is read from its file.

    Args: see `learn_sequence`.

    Raises:
        ConceptError: A file was made with other steps, settings, base or pictures, or by an earlier version.
    """
    path, made_with = folder / f"{run.name}.json", _made_with(suite, run, settings, training)
    suite = replace(suite, settings=replace(suite.settings, **run.sampling()))
    stored = finished_run(path)
    if stored is not None:
        check_same(path, stored, made_with)
        if "judges" not in stored:
            raise ConceptError(f"'{path}' was written by an earlier version; choose another folder with "
                               "--runs")
        finished = _up_to_date(sampler, suite, run, stored, folder)
        if finished is not None:
            _write(path, finished)
            return finished
    folder.mkdir(parents=True, exist_ok=True)
    progress, bank = learn_sequence(sampler, suite, run, places, settings, training, folder, callbacks)
    layout = sampler.backbone.layout
    banks = {name: ConceptBank(layout).add(bank[name]) if run.alone else bank for name in progress.names}
    result = {**run.to_json(), **made_with, "concepts": progress.names}
    result |= final_figures(sampler, banks, bank, suite, progress, run.alone)
    result |= cost_figures(suite, progress, bank)
    _write(path, result)
    (folder / f"{run.name}.progress.json").unlink(missing_ok=True)
    return result

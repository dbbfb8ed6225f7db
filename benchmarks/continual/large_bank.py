"""A bank of many concepts beside one of two: the same pictures, and the same cost?

Two concepts are learned. The large bank holds them first, and behind them copies under other names, scaled at
random. Nothing but the number of concepts differs.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ...core.bank.bank import ConceptBank
from ...core.bank.format import open_bank, save_bank
from ...core.data.framing import Framing
from ...core.data.training_set import TrainingData, prepare
from ...core.demo.base import load_base
from ...core.demo.bases import file_of
from ...core.demo.judges import assignment_of
from ...core.errors import ConceptError
from ...core.hosts.diffusers import DiffusersBackbone
from ...core.methods.base import Method, Task, make
from ...core.sampling.sampling import sample
from ...core.sampling.settings import SampleSettings
from ...core.training.config import TrainingConfig
from ...core.training.loop import learn
from ...core.training.trainer import Trainer
from . import embedded
from .concepts import concepts

LEARNED, NEXT = ("rex", "mimi"), "quack"
PROMPTS = {"no concept": "a photo of a robot in a room", "one": "a photo of <rex> on a beach",
           "two": "a photo of <rex> and <mimi> in a meadow"}
SEED = 100


def filled(bank: ConceptBank, count: int) -> ConceptBank:
    """The bank with copies of its concepts behind them, `count` in all."""
    rng, originals, grown = random.Random(0), list(bank), bank
    for i in range(len(bank), count):
        copy = originals[i % len(originals)].renamed(f"copy{i}")
        deltas = {key: delta.scaled(rng.uniform(0.5, 1.5)) for key, delta in copy.deltas.items()}
        grown = grown.add(replace(copy, deltas=deltas))
    return grown


def _task(backbone: DiffusersBackbone, name: str, bank: ConceptBank, method: str,
          steps: int) -> tuple[Task, Method, TrainingData, TrainingConfig]:
    """What `learn` and `Trainer` take."""
    concept = next(concept for concept in concepts() if concept.name == name)
    config = embedded.training(steps, 0, backbone.picture_size)
    pictures = assignment_of(concept, size=backbone.picture_size).pictures
    data = prepare(backbone, pictures, name, concept.class_noun,
                   Framing(config.resolution, config.framing, config.flip))
    task = Task(name, concept.class_noun, backbone, bank, concept.kind)
    settings = embedded.settings_of_kind(method, backbone.fingerprint, concept.kind)
    return task, make(method, settings), data, config


def _clock(run: Callable[[], object]) -> float:
    """Seconds of the processor, which other load hardly changes."""
    began = time.process_time()
    run()
    return time.process_time() - began


def compared(runs: list[Callable[[], object]], rounds: int) -> dict:
    """Smallest seconds of both runs, and the median ratio of the second to the first, run in turn."""
    times = [[_clock(run) for run in runs] for _ in range(rounds)]
    small, large = (min(column) for column in zip(*times, strict=True))
    return {"small": small, "large": large,
            "ratio": statistics.median(second / first for first, second in times)}


def large_bank(method: str, count: int, steps: int, rounds: int, folder: Path, base_name: str) -> dict:
    """Measures a large bank against one of two concepts.

    Args:
        method: How the two are learned.
        count: Concepts in the large bank, more than two.
        steps: Of learning each.
        rounds: Measurements of everything.
        folder: For the two files.
        base_name: Name of the embedded base.

    Returns:
        `same`: whether pictures of each prompt are the same, bit for bit. `open`, `sample`, `train`: seconds
        of the processor for opening the file and listing its concepts, for opening it and drawing a picture
        of two concepts (16 steps), and for a step of learning a further concept.
    """
    if count <= len(LEARNED):
        raise ConceptError(f"the number of concepts is {count}; allowed: {len(LEARNED) + 1} or more")
    backbone = load_base(file_of(base_name))
    bank = ConceptBank(backbone.layout)
    for name in LEARNED:
        bank = learn(*_task(backbone, name, bank, method, steps)).bank
    files = folder / "small.safetensors", folder / "large.safetensors"
    for made, file in zip((bank, filled(bank, count)), files, strict=True):
        save_bank(made, file)
    opened = [open_bank(file) for file in files]
    settings = replace(embedded.SETTINGS, size=(backbone.picture_size,) * 2)
    drawn = {what: [sample(backbone, one, [prompt], [SEED], settings) for one in opened]
             for what, prompt in PROMPTS.items()}
    return {
        "method": method, "settings": embedded.settings_of(method, backbone.fingerprint), "steps": steps,
        "concepts": count, "base": backbone.fingerprint, "bytes": [file.stat().st_size for file in files],
        "same": {what: torch.equal(*pictures) for what, pictures in drawn.items()},
        "open": compared([lambda file=file: list(open_bank(file).infos.values()) for file in files], rounds),
        "sample": compared([lambda file=file: _picture(backbone, file, settings) for file in files], rounds),
        "train": _training_steps(backbone, opened, method, rounds),
    }


def _picture(backbone: DiffusersBackbone, file: Path, settings: SampleSettings) -> None:
    sample(backbone, open_bank(file), [PROMPTS["two"]], [SEED], settings)


def _training_steps(backbone: DiffusersBackbone, banks: list[ConceptBank], method: str, rounds: int) -> dict:
    """Steps of learning a further concept. The first step of each, which warms up, does not count."""
    trainers = [Trainer(*_task(backbone, NEXT, bank, method, 10 * rounds + 1)) for bank in banks]
    with trainers[0].session(), trainers[1].session():      # concepts that are stored apart fold nothing
        for trainer in trainers:
            trainer.step()
        return compared([trainer.step for trainer in trainers], 10 * rounds)


def lines_of(result: dict) -> list[str]:
    """The result as text."""
    same = ", ".join(f"{what} {'the same' if is_same else 'different'}"
                     for what, is_same in result["same"].items())
    named = {"open": "opening the file", "sample": "a picture of two concepts", "train": "a training step"}
    return [f"pictures of prompts with {same}"] + [
        f"{text}: {result[key]['small']:.4f} s with {len(LEARNED)} concepts, {result[key]['large']:.4f} s "
        f"with {result['concepts']} (median ratio {result[key]['ratio']:.3f})" for key, text in named.items()]

"""Measures the cost of a training step on a checkpoint's shape with random weights, compared with other
trainers.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, TypedDict

import torch

from ...core.bank.bank import ConceptBank
from ...core.bank.composition import WORDS
from ...core.bank.concepts import Concept, ConceptInfo
from ...core.bank.format import open_bank, save_bank
from ...core.bank.prompts import Vocabulary
from ...core.bank.tokens import TokenGroup, default_words
from ...core.conditioning.encoding import encode_prompts
from ...core.data.training_set import TrainingSet
from ...core.methods.base import METHODS, Task, make
from ...core.methods.low_rank import KEYS_AND_VALUES
from ...core.model.backbone import Backbone
from ...core.model.deltas import Deltas
from ...core.model.sites import PROJECTIONS, SiteLayout
from ...core.training.config import TrainingConfig
from ...core.training.loop import learn
from ...core.training.memory import retained_between_steps
from ...core.training.trainer import Trainer
from .synthetic import deltas_of, peak_gb, seconds, slots_of

NEW, NOUN = "new", "dog"
CAPTIONS = (f"a photo of <{NEW}> in a park", f"a photo of <{NEW}> on a sofa, seen from the side")
ROWS: dict[str, tuple[str, dict]] = {
    "bound": ("bound", {}), "bound, one copy": ("bound", {"layerwise": False}), "cidm": ("cidm", {}),
    "cidm, one copy": ("cidm", {"layerwise": False}), "clora": ("clora", {}), "lora": ("lora", {}),
    "slots": ("slots", {}),
}
APART = ("bound", "slots")      # methods whose words are encoded apart from the rest of a prompt
CONCEPTS = (1, 100)      # number of concepts in the bank during training
# rows measured with both banks; the others only with the first
GROWING = ("bound", "cidm", "clora")


class Timing(TypedDict):
    """Measurements of several steps: seconds of every step except the first, and peak memory in GiB."""

    seconds: list[float]
    peak_gb: float | None


@dataclass(frozen=True)
class StepTimes:
    """Seconds of consecutive measurements: forward passes of text encoder and UNet, and a step."""

    text: float
    forward: float
    step: float


@dataclass(frozen=True)
class Setup:
    """Setup of a measured step.

    Attributes:
        shape: Name of a checkpoint's shape.
        pixels: Side of the pictures in pixels.
        precision: Computation type.
        checkpointing: Whether activations are recomputed instead of stored.
        base: Type of the base's weights; "" = float32 on a processor, float16 on a graphics card.
        blocks: Blocks of a transformer, and of SDXL where it has ten; 0 = all.
        small: Whether the model is a narrow one of the same form, for rehearsals.
    """

    shape: str = "sd15"
    pixels: int = 256
    precision: str = "float32"
    checkpointing: bool = False
    base: str = ""
    blocks: int = 0
    small: bool = False

    @property
    def side(self) -> int:
        """Side of the latents."""
        return self.pixels // 8

    def training(self, steps: int) -> TrainingConfig:
        return TrainingConfig(steps=steps, resolution=self.pixels, precision=self.precision,
                              gradient_checkpointing=self.checkpointing)


class Host(Protocol):
    """A model for training, and other trainers for the same shape: name -> steps -> Timing."""

    backbone: Backbone
    setup: Setup

    @property
    def weights(self) -> int: ...

    def training(self) -> AbstractContextManager: ...

    def release(self) -> None: ...

    def rivals(self) -> Mapping[str, Callable[[int], Timing]]: ...


def tokens_of(layout: SiteLayout, name: str, copies: int, generator: torch.Generator,
              placeholder_noun: str = "") -> TokenGroup:
    vectors = {encoder: 0.02 * torch.randn(copies, 2, width, generator=generator)
               for encoder, width in layout.text_widths}
    return TokenGroup(default_words(name, 2), vectors, placeholder_noun)


def random_bank(layout: SiteLayout, method: str, count: int) -> ConceptBank:
    """A bank of `count` random concepts of one method, with the method's storage types."""
    bank, generator = ConceptBank(layout), torch.Generator().manual_seed(0)
    for i in range(count):
        name = f"old{i}"
        copies = 1 if method == "slots" else layout.copies
        tokens = tokens_of(layout, name, copies, generator, NOUN if method in APART else "")
        changed = KEYS_AND_VALUES if method == "clora" else PROJECTIONS
        deltas: Deltas = {key: delta for key, delta in deltas_of(layout, i).items() if key[1] in changed}
        deltas = slots_of(layout, i) if method == "slots" else deltas
        deltas = {key: delta.to(dtype=torch.float16) for key, delta in deltas.items()}
        info = ConceptInfo(name, NOUN, method, tokens.words,
                           composition=WORDS if method == "slots" else None)
        bank = bank.add(Concept(info, tokens, deltas))
    return bank


def random_set(backbone: Backbone, side: int) -> TrainingSet:
    """A training set of four random latents with two captions."""
    latents = torch.randn(4, backbone.latent_channels, side, side,
                          generator=torch.Generator().manual_seed(1)).to(backbone.device)
    masks = torch.ones(4, 1, side, side, device=backbone.device)
    return TrainingSet(latents, masks, CAPTIONS * 2, torch.zeros(4, dtype=torch.bool), ("",) * 4)


def timed(run: Callable[[Callable[[], object]], object]) -> Timing:
    """Times the steps of `run`, which must call the given function after every step."""
    marks: list[float] = []
    peak = peak_gb(lambda: run(lambda *_: marks.append(time.perf_counter())))
    return {"seconds": [b - a for a, b in zip(marks, marks[1:], strict=False)], "peak_gb": peak}


def stored_bank(layout: SiteLayout, method: str, count: int, folder: Path) -> ConceptBank:
    """A random bank opened from a file, with its tensors still on disk."""
    path = folder / f"{method}-{count}.safetensors"
    if not path.exists():
        save_bank(random_bank(layout, method, count), path)
    return open_bank(path)


def peak_of(host: Host, row: str, bank: ConceptBank) -> float | None:
    """Peak GiB of training with the concepts of a bank."""
    method, settings = ROWS[row]
    backbone, data = host.backbone, random_set(host.backbone, host.setup.side)

    def run() -> None:
        with host.training():
            learn(Task(NEW, NOUN, backbone, bank), make(method, settings), data, host.setup.training(2))

    return peak_gb(run)


def _clock(run: Callable[[], object]) -> float:
    return seconds(run, rounds=1)


def _passes(host: Host, row: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """The forward passes of a row's step: text encoder and UNet."""
    method, settings = ROWS[row]
    backbone, config = host.backbone, METHODS[method].config(**settings)
    copies = backbone.layout.copies if config.layerwise and method != "slots" else 1
    generator = torch.Generator().manual_seed(2)
    tokens = tokens_of(backbone.layout, NEW, copies, generator, NOUN if method in APART else "")
    vocabulary = Vocabulary([ConceptInfo(NEW, NOUN, method, tokens.words)])
    latents = random_set(backbone, host.setup.side).latents[:1]
    time_step = torch.tensor([500], device=backbone.device)

    @torch.no_grad()
    def text():
        return encode_prompts(backbone, vocabulary.parse_all(CAPTIONS[:1]), {NEW: tokens})

    context = text()
    return text, torch.no_grad()(lambda: backbone.predict(latents, time_step, context))


@contextmanager
def _trainers(host: Host, row: str, banks: Sequence[ConceptBank], steps: int) -> Iterator[list[Trainer]]:
    """Context manager that yields a trainer for each bank, ready to make steps."""
    method, settings = ROWS[row]
    data = random_set(host.backbone, host.setup.side)
    training = host.setup.training(steps)
    with torch.inference_mode(False), host.training(), retained_between_steps(host.backbone.device):
        yield [Trainer(Task(NEW, NOUN, host.backbone, bank), make(method, settings), data, training)
               for bank in banks]


def _step(trainer: Trainer) -> float:
    with trainer.session():
        return _clock(trainer.step)


def step_times(host: Host, row: str, bank: ConceptBank, rounds: int) -> list[StepTimes]:
    """Measures forward passes and a step `rounds` times, one directly after the other.

    The speed of a machine varies more between runs than the measured ratios. The first round warms up and is
    discarded.
    """
    with _trainers(host, row, [bank], rounds + 1) as (trainer,):
        text, forward = _passes(host, row)
        return [StepTimes(_clock(text), _clock(forward), _step(trainer)) for _ in range(rounds + 1)][1:]


def growth(host: Host, row: str, banks: Sequence[ConceptBank], rounds: int) -> list[tuple[float, float]]:
    """Seconds of a step with the first and with the second bank, alternating, `rounds` times."""
    with _trainers(host, row, banks, rounds + 1) as trainers:
        first, second = trainers
        return [(_step(first), _step(second)) for _ in range(rounds + 1)][1:]


def measure(host: Host, steps: int, rounds: int, report: Callable[[str], object],
            names: Sequence[str] = tuple(ROWS), alone: bool = False) -> dict:
    """Runs the benchmark and returns its JSON.

    Ratios to the forward passes and between banks are medians over consecutive measurements. Seconds are
    minima. The host's model is released at the end.

    Args:
        host: Model and other trainers.
        steps: Steps of each measurement.
        rounds: Measurements of each row.
        report: Called with a line per row.
        names: Names of the rows.
        alone: Whether to skip banks of a hundred concepts and other trainers.
    """
    rows: dict[str, dict] = {}
    with TemporaryDirectory() as name:
        for row in names:
            method, counts = ROWS[row][0], CONCEPTS[:1] if alone or row not in GROWING else CONCEPTS
            banks = [stored_bank(host.backbone.layout, method, count, Path(name)) for count in counts]
            rows[row] = _row(step_times(host, row, banks[0], steps * rounds), peak_of(host, row, banks[0]))
            if len(banks) > 1:
                rows[row] |= _grown(growth(host, row, banks, steps * rounds),
                                    [rows[row]["peak_gb"], peak_of(host, row, banks[1])])
            report(f"{row}: {rows[row]['step_seconds']:.2f} s a step, "
                   f"{rows[row]['step_over_forwards']:.2f} of its forward passes, "
                   f"{rows[row]['step_over_unet']:.2f} of the UNet's")
    rivals, others = {}, {} if alone else host.rivals()
    host.release()      # the memory of other trainers must not include our model
    gc.collect()
    for name, train in others.items():
        rivals[name] = train(steps)
        report(f"{name}: {min(rivals[name]['seconds']):.2f} s a step")
    return _summary(host.setup, rows, rivals)


def _summary(setup: Setup, rows: Mapping[str, dict], rivals: Mapping[str, Timing]) -> dict:
    others = {name: {"step_seconds": min(timing["seconds"]), "peak_gb": timing["peak_gb"]}
              for name, timing in rivals.items()}
    for row in rows.values():
        for name, other in others.items():
            row[f"faster_than_{name}"] = other["step_seconds"] / row["step_seconds"]
            row[f"peak_over_{name}"] = _ratio(row["peak_gb"], other["peak_gb"])
    device = f"cpu, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {**asdict(setup), "device": device, **next(iter(rows.values())), **others, "rows": rows}


def _row(times: Sequence[StepTimes], peak: float | None) -> dict:
    return {
        "forward_seconds": min(t.forward for t in times), "text_seconds": min(t.text for t in times),
        "step_seconds": min(t.step for t in times),
        "step_over_unet": statistics.median(t.step / t.forward for t in times),
        "step_over_forwards": statistics.median(t.step / (t.text + t.forward) for t in times),
        "peak_gb": peak,
    }


def _grown(pairs: Sequence[tuple[float, float]], peaks: Sequence[float | None]) -> dict:
    seconds = [min(pair[i] for pair in pairs) for i in range(len(CONCEPTS))]
    return {"concepts": {str(count): {"step_seconds": second, "peak_gb": peak}
                         for count, second, peak in zip(CONCEPTS, seconds, peaks, strict=True)},
            "hundred_over_one": statistics.median(hundred / single for single, hundred in pairs),
            "peak_hundred_over_one": _ratio(peaks[1], peaks[0])}


def _ratio(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value / other


def profile(host: Host, row: str) -> str:
    """Profiles the second of two steps; returns a table."""
    on_card = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_card
    method, settings = ROWS[row]
    task = Task(NEW, NOUN, host.backbone, random_bank(host.backbone.layout, method, 1))
    data = random_set(host.backbone, host.setup.side)
    plan = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=plan) as profiler, host.training():
        learn(task, make(method, settings), data, host.setup.training(2), lambda _: profiler.step())
    order = f"self_{'device' if on_card else 'cpu'}_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=48)
    return f"{row}, one step\n{table}"


def optimizer_steps(run: Callable[[], object]) -> Timing:
    """Times a trainer without callbacks, by its optimiser steps."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def marked(mark) -> None:
        hook = register_optimizer_step_post_hook(lambda *_: mark())
        try:
            run()
        finally:
            hook.remove()

    return timed(marked)

"""`bench training`: what a step of learning costs, on Stable Diffusion 1.5's shape with random weights, beside other trainers."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import torch

from ...core.bank.bank import ConceptBank
from ...core.bank.concepts import Concept, ConceptInfo
from ...core.bank.format import open_bank, save_bank
from ...core.bank.prompts import Vocabulary
from ...core.bank.tokens import TokenGroup, default_words
from ...core.conditioning.encoding import encode_prompts
from ...core.data.training_set import TrainingSet
from ...core.methods.base import METHODS, Task, make
from ...core.methods.clora import KEYS_AND_VALUES
from ...core.model.backbone import Backbone
from ...core.model.sites import PROJECTIONS, SiteLayout
from ...core.training.config import TrainingConfig
from ...core.training.loop import learn
from ...core.training.memory import retained_between_steps
from ...core.training.trainer import Trainer
from .synthetic import deltas_of, peak_gb, seconds

NEW, NOUN = "new", "dog"
CAPTIONS = (f"a photo of <{NEW}> in a park", f"a photo of <{NEW}> on a sofa, seen from the side")
ROWS: dict[str, tuple[str, dict]] = {
    "bound": ("bound", {}), "bound, one copy": ("bound", {"layerwise": False}), "cidm": ("cidm", {}),
    "cidm, one copy": ("cidm", {"layerwise": False}), "clora": ("clora", {}),
}
CONCEPTS = (1, 100)      # in the bank while one more is learned
GROWING = ("bound", "cidm", "clora")      # rows that are looked at with each of them; the others with one
Look = dict      # "seconds": of every step but the first; "peak_gb"


@dataclass(frozen=True)
class Pace:
    """Seconds of things done right after each other: the passes forward of the texts and of the UNet, and a step."""

    text: float
    forward: float
    step: float


@dataclass(frozen=True)
class Setup:
    """What a step is measured on: the shape of a checkpoint, the side of the pictures in pixels, the type of the arithmetic, whether
    activations are computed again instead of kept."""

    shape: str = "sd15"
    pixels: int = 256
    precision: str = "float32"
    checkpointing: bool = False

    @property
    def side(self) -> int:
        """Of the latents."""
        return self.pixels // 8

    def training(self, steps: int) -> TrainingConfig:
        return TrainingConfig(steps=steps, resolution=self.pixels, precision=self.precision, gradient_checkpointing=self.checkpointing)


class Host(Protocol):
    """A model to learn on, and other people's trainers for the same shape: name -> steps -> Look."""

    backbone: Backbone
    setup: Setup

    def training(self) -> AbstractContextManager: ...

    def rivals(self) -> Mapping[str, Callable[[int], Look]]: ...


def tokens_of(layout: SiteLayout, name: str, copies: int, generator: torch.Generator, placeholder_noun: str = "") -> TokenGroup:
    vectors = {encoder: 0.02 * torch.randn(copies, 2, width, generator=generator) for encoder, width in layout.text_widths}
    return TokenGroup(default_words(name, 2), vectors, placeholder_noun)


def random_bank(layout: SiteLayout, method: str, count: int) -> ConceptBank:
    """`count` random concepts of one method, in the types that it stores them in."""
    bank, generator = ConceptBank(layout), torch.Generator().manual_seed(0)
    for i in range(count):
        name = f"old{i}"
        tokens = tokens_of(layout, name, layout.copies, generator, NOUN if method == "bound" else "")
        changed = KEYS_AND_VALUES if method == "clora" else PROJECTIONS
        deltas = {key: delta.to(dtype=torch.float16) for key, delta in deltas_of(layout, i).items() if key[1] in changed}
        bank = bank.add(Concept(ConceptInfo(name, NOUN, method, tokens.words), tokens, deltas))
    return bank


def random_set(backbone: Backbone, side: int) -> TrainingSet:
    """Four latents with two captions."""
    latents = torch.randn(4, backbone.latent_channels, side, side, generator=torch.Generator().manual_seed(1)).to(backbone.device)
    masks = torch.ones(4, 1, side, side, device=backbone.device)
    return TrainingSet(latents, masks, CAPTIONS * 2, torch.zeros(4, dtype=torch.bool), ("",) * 4)


def timed(run: Callable[[Callable[[], object]], object]) -> Look:
    """`run` gets what it is to call after every step."""
    marks: list[float] = []
    peak = peak_gb(lambda: run(lambda *_: marks.append(time.perf_counter())))
    return {"seconds": [b - a for a, b in zip(marks, marks[1:], strict=False)], "peak_gb": peak}


def stored_bank(layout: SiteLayout, method: str, count: int, folder: Path) -> ConceptBank:
    """The same as people have it: opened from a file, its tensors still on disk."""
    path = folder / f"{method}-{count}.safetensors"
    if not path.exists():
        save_bank(random_bank(layout, method, count), path)
    return open_bank(path)


def peak_of(host: Host, row: str, bank: ConceptBank) -> float | None:
    """GiB at the peak of learning on top of a bank."""
    method, settings = ROWS[row]
    backbone, data = host.backbone, random_set(host.backbone, host.setup.side)

    def run() -> None:
        with host.training():
            learn(Task(NEW, NOUN, backbone, bank), make(method, settings), data, host.setup.training(2))

    return peak_gb(run)


def _clock(run: Callable[[], object]) -> float:
    return seconds(run, rounds=1)


def _passes(host: Host, row: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """The passes forward that a step of a row needs, of its texts and of the UNet."""
    method, settings = ROWS[row]
    backbone, config = host.backbone, METHODS[method].config(**settings)
    copies = backbone.layout.copies if config.layerwise else 1
    tokens = tokens_of(backbone.layout, NEW, copies, torch.Generator().manual_seed(2), NOUN if method == "bound" else "")
    vocabulary = Vocabulary([ConceptInfo(NEW, NOUN, method, tokens.words)])
    latents, time_step = random_set(backbone, host.setup.side).latents[:1], torch.tensor([500], device=backbone.device)

    @torch.no_grad()
    def text():
        return encode_prompts(backbone, vocabulary.parse_all(CAPTIONS[:1]), {NEW: tokens})

    context = text()
    return text, torch.no_grad()(lambda: backbone.predict(latents, time_step, context))


@contextmanager
def _running(host: Host, row: str, banks: Sequence[ConceptBank], steps: int) -> Iterator[list[Trainer]]:
    """A run on top of each bank, in a place where steps can be made."""
    method, settings = ROWS[row]
    data = random_set(host.backbone, host.setup.side)
    with torch.inference_mode(False), host.training(), retained_between_steps(host.backbone.device):
        yield [Trainer(Task(NEW, NOUN, host.backbone, bank), make(method, settings), data, host.setup.training(steps)) for bank in banks]


def _step(run: Trainer) -> float:
    with run.session():
        return _clock(run.step)


def paces(host: Host, row: str, bank: ConceptBank, rounds: int) -> list[Pace]:
    """`rounds` times the passes forward and a step, right after each other: in the minutes between whole runs a machine's pace changes by
    more than what is asked. A first round only warms up and is left out."""
    with _running(host, row, [bank], rounds + 1) as (run,):
        text, forward = _passes(host, row)
        return [Pace(_clock(text), _clock(forward), _step(run)) for _ in range(rounds + 1)][1:]


def growth(host: Host, row: str, banks: Sequence[ConceptBank], rounds: int) -> list[tuple[float, float]]:
    """`rounds` times a step on top of the first bank and one on top of the second, in turn: each comes after one of the other."""
    with _running(host, row, banks, rounds + 1) as runs:
        return [tuple(_step(run) for run in runs) for _ in range(rounds + 1)][1:]


def measure(host: Host, steps: int, rounds: int, tell: Callable[[str], object], names: Sequence[str] = tuple(ROWS),
            alone: bool = False) -> dict:
    """The JSON of the benchmark; the host has no model any more afterwards. Ratios to the passes forward and between banks are medians of
    things done right after each other; seconds are the least. names: the rows; alone: no banks of a hundred concepts, no other trainers."""
    rows: dict[str, dict] = {}
    with TemporaryDirectory() as name:
        for row in names:
            method, counts = ROWS[row][0], CONCEPTS[:1] if alone or row not in GROWING else CONCEPTS
            banks = [stored_bank(host.backbone.layout, method, count, Path(name)) for count in counts]
            rows[row] = _row(paces(host, row, banks[0], steps * rounds), peak_of(host, row, banks[0]))
            if len(banks) > 1:
                rows[row] |= _grown(growth(host, row, banks, steps * rounds), [rows[row]["peak_gb"], peak_of(host, row, banks[1])])
            tell(f"{row}: {rows[row]['step_seconds']:.2f} s a step, {rows[row]['step_over_forwards']:.2f} of its passes forward")
    rivals, others = {}, {} if alone else host.rivals()
    host.backbone = None      # our model is no part of what others need
    gc.collect()
    for name, look in others.items():
        rivals[name] = look(steps)
        tell(f"{name}: {min(rivals[name]['seconds']):.2f} s a step")
    return _told(host.setup, rows, rivals)


def _told(setup: Setup, rows: Mapping[str, dict], rivals: Mapping[str, Look]) -> dict:
    others = {name: {"step_seconds": min(look["seconds"]), "peak_gb": look["peak_gb"]} for name, look in rivals.items()}
    for row in rows.values():
        for name, other in others.items():
            row[f"faster_than_{name}"] = other["step_seconds"] / row["step_seconds"]
            row[f"peak_over_{name}"] = _ratio(row["peak_gb"], other["peak_gb"])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return {**asdict(setup), "device": device, **next(iter(rows.values())), **others, "rows": rows}


def _row(found: Sequence[Pace], peak: float | None) -> dict:
    return {
        "forward_seconds": min(pace.forward for pace in found), "text_seconds": min(pace.text for pace in found),
        "step_seconds": min(pace.step for pace in found),
        "step_over_forwards": statistics.median(pace.step / (pace.text + pace.forward) for pace in found), "peak_gb": peak,
    }


def _grown(found: Sequence[tuple[float, float]], peaks: Sequence[float | None]) -> dict:
    seconds = [min(pair[i] for pair in found) for i in range(len(CONCEPTS))]
    return {"concepts": {str(count): {"step_seconds": second, "peak_gb": peak}
                         for count, second, peak in zip(CONCEPTS, seconds, peaks, strict=True)},
            "hundred_over_one": statistics.median(many / one for one, many in found), "peak_hundred_over_one": _ratio(peaks[1], peaks[0])}


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def profile(host: Host, row: str) -> str:
    """What the second of two steps spends its time on, as a table."""
    on_card = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_card
    method, settings = ROWS[row]
    task, data = Task(NEW, NOUN, host.backbone, random_bank(host.backbone.layout, method, 1)), random_set(host.backbone, host.setup.side)
    plan = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=plan, acc_events=True) as found, host.training():
        learn(task, make(method, settings), data, host.setup.training(2), lambda _: found.step())
    order = f"self_{'device' if on_card else 'cpu'}_time_total"
    return f"{row}, one step\n" + found.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=48)


def optimizer_steps(run: Callable[[], object]) -> Look:
    """A trainer that tells nobody of its steps: its optimiser's are counted."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def marked(mark) -> None:
        hook = register_optimizer_step_post_hook(lambda *_: mark())
        try:
            run()
        finally:
            hook.remove()

    return timed(marked)

"""`bench training`: what a step of learning costs, on Stable Diffusion 1.5's shape with random weights, beside other trainers."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import torch

from .bank import ConceptBank
from .bankfile import open_bank, save_bank
from .concepts import Concept, ConceptInfo
from .encoding import encode_prompts
from .hosts.backbone import Backbone
from .methods.base import METHODS, Task, make
from .methods.clora import KEYS_AND_VALUES
from .prompts import Vocabulary
from .sites import PROJECTIONS, SiteLayout
from .synthetic import deltas_of, peak_gb, seconds
from .tokens import TokenGroup, default_words
from .training.config import TrainingConfig
from .training.data import TrainingSet
from .training.loop import Run, fit_for_steps, learn
from .training.memory import kept_between_steps

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
    """Seconds of things done right after each other: the passes forward of the texts and of the UNet, and a step on top of each bank."""

    text: float
    forward: float
    steps: tuple[float, ...]


class Host(Protocol):
    """A model to learn on, and other people's trainers for the same shape: name -> steps -> Look."""

    backbone: Backbone
    side: int      # of the latents

    def training(self) -> AbstractContextManager: ...

    def rivals(self) -> Mapping[str, Callable[[int], Look]]: ...


def tokens_of(layout: SiteLayout, name: str, copies: int, generator: torch.Generator, stand_in: str = "") -> TokenGroup:
    vectors = {encoder: 0.02 * torch.randn(copies, 2, width, generator=generator) for encoder, width in layout.text_widths}
    return TokenGroup(default_words(name, 2), vectors, stand_in)


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


def peak_of(host: Host, row: str, bank: ConceptBank, config: TrainingConfig) -> float | None:
    """GiB at the peak of learning on top of a bank."""
    method, settings = ROWS[row]
    backbone, data = host.backbone, random_set(host.backbone, host.side)

    def run() -> None:
        with host.training():
            learn(Task(NEW, NOUN, backbone, bank), make(method, settings), data, config)

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
    latents, time_step = random_set(backbone, host.side).latents[:1], torch.tensor([500], device=backbone.device)

    @torch.no_grad()
    def text():
        return encode_prompts(backbone, CAPTIONS[:1], vocabulary, {NEW: tokens})

    context = text()
    return text, torch.no_grad()(lambda: backbone.predict(latents, time_step, context))


@torch.inference_mode(False)
def paces(host: Host, row: str, banks: Sequence[ConceptBank], config: TrainingConfig, rounds: int) -> list[Pace]:
    """`rounds` times: the passes forward, then a step on top of each bank, one right after the other: in the minutes between whole runs
    a machine's pace changes by more than what is asked. A first round only warms up and is left out."""
    method, settings = ROWS[row]
    data, found = random_set(host.backbone, host.side), []
    with host.training():
        runs = [Run(Task(NEW, NOUN, host.backbone, bank), make(method, settings), data, config) for bank in banks]
        text, forward = _passes(host, row)
        for _ in range(rounds + 1):
            steps = []
            with kept_between_steps(host.backbone.device):
                parts = _clock(text), _clock(forward)
                for run in runs:
                    with fit_for_steps(run):
                        steps.append(_clock(run.step))
            found.append(Pace(*parts, tuple(steps)))
    return found[1:]


def measure(host: Host, pixels: int, steps: int, rounds: int, tell: Callable[[str], object], precision: str = "float32") -> dict:
    """The JSON of the benchmark; the host has no model any more afterwards. Ratios to the passes forward and between banks are medians of
    things done right after each other; seconds are the least."""
    config = TrainingConfig(steps=steps, resolution=pixels, precision=precision)
    rows: dict[str, dict] = {}
    with TemporaryDirectory() as name:
        for row, (method, _) in ROWS.items():
            counts = CONCEPTS if row in GROWING else CONCEPTS[:1]
            banks = [stored_bank(host.backbone.layout, method, count, Path(name)) for count in counts]
            found = paces(host, row, banks, config, steps * rounds)
            peaks = [peak_of(host, row, bank, replace(config, steps=2)) for bank in banks]
            rows[row] = _row(counts, found, peaks)
            tell(f"{row}: {rows[row]['step_seconds']:.2f} s a step, {rows[row]['step_over_forwards']:.2f} of its passes forward")
    rivals, others = {}, host.rivals()
    host.backbone = None      # our model is no part of what others need
    gc.collect()
    for name, look in others.items():
        rivals[name] = look(steps)
        tell(f"{name}: {min(rivals[name]['seconds']):.2f} s a step")
    return _told(pixels, rows, rivals)


def _told(pixels: int, rows: Mapping[str, dict], rivals: Mapping[str, Look]) -> dict:
    others = {name: {"step_seconds": min(look["seconds"]), "peak_gb": look["peak_gb"]} for name, look in rivals.items()}
    for row in rows.values():
        for name, other in others.items():
            row[f"faster_than_{name}"] = other["step_seconds"] / row["step_seconds"]
            row[f"peak_over_{name}"] = _ratio(row["peak_gb"], other["peak_gb"])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return {"shape": "sd15", "pixels": pixels, "device": device, **rows[next(iter(ROWS))], **others, "rows": rows}


def _row(counts: Sequence[int], found: Sequence[Pace], peaks: Sequence[float | None]) -> dict:
    forwards = {"forward_seconds": min(pace.forward for pace in found), "text_seconds": min(pace.text for pace in found)}
    concepts = {str(count): forwards | {
        "step_seconds": min(pace.steps[i] for pace in found),
        "step_over_forwards": statistics.median(pace.steps[i] / (pace.text + pace.forward) for pace in found),
        "peak_gb": peaks[i],
    } for i, count in enumerate(counts)}
    row = concepts[str(counts[0])] | {"concepts": concepts}
    if len(counts) > 1:
        row["hundred_over_one"] = statistics.median(pace.steps[1] / pace.steps[0] for pace in found)
        row["peak_hundred_over_one"] = _ratio(peaks[1], peaks[0])
    return row


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def profile(host: Host, row: str, config: TrainingConfig) -> str:
    """What the second of two steps spends its time on, as a table."""
    on_card = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_card
    method, settings = ROWS[row]
    task, data = Task(NEW, NOUN, host.backbone, random_bank(host.backbone.layout, method, 1)), random_set(host.backbone, host.side)
    plan = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=plan, acc_events=True) as found, host.training():
        learn(task, make(method, settings), data, replace(config, steps=2), lambda _: found.step())
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

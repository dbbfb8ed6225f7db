"""`bench training`: what a step of learning costs, on Stable Diffusion 1.5's shape with random weights, beside other trainers."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
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
from .routing import learning_deltas
from .sites import PROJECTIONS, SiteLayout
from .synthetic import deltas_of, peak_gb, seconds
from .tokens import TokenGroup, default_words
from .training.config import TrainingConfig
from .training.data import TrainingSet
from .training.loop import Run, learn

NEW, NOUN = "new", "dog"
CAPTIONS = (f"a photo of <{NEW}> in a park", f"a photo of <{NEW}> on a sofa, seen from the side")
ROWS: dict[str, tuple[str, dict]] = {
    "bound": ("bound", {}), "bound, one copy": ("bound", {"layerwise": False}), "cidm": ("cidm", {}),
    "cidm, one copy": ("cidm", {"layerwise": False}), "clora": ("clora", {}),
}
CONCEPTS = (1, 100)      # in the bank while one more is learned
GROWING = ("bound", "cidm", "clora")      # rows that are looked at with each of them; the others with one
Look = dict      # "seconds": of every step but the first; "peak_gb"


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


def step_look(host: Host, row: str, bank: ConceptBank, config: TrainingConfig) -> Look:
    """Learning on top of a bank."""
    method, settings = ROWS[row]
    backbone = host.backbone
    data = random_set(backbone, host.side)

    def run(mark) -> None:
        with host.training():
            learn(Task(NEW, NOUN, backbone, bank), make(method, settings), data, config, mark)

    return timed(run)


@torch.no_grad()
def forward_look(host: Host, row: str) -> dict[str, float]:
    """Seconds of the passes forward that a step of a row needs: the UNet's, and that of its texts."""
    method, settings = ROWS[row]
    backbone, config = host.backbone, METHODS[method].config(**settings)
    copies = backbone.layout.copies if config.layerwise else 1
    tokens = tokens_of(backbone.layout, NEW, copies, torch.Generator().manual_seed(2), NOUN if method == "bound" else "")
    vocabulary = Vocabulary([ConceptInfo(NEW, NOUN, method, tokens.words)])
    data = random_set(backbone, host.side)

    def text():
        return encode_prompts(backbone, CAPTIONS[:1], vocabulary, {NEW: tokens})

    with host.training():
        context, time_step = text(), torch.tensor([500], device=backbone.device)
        return {"text_seconds": seconds(text),
                "forward_seconds": seconds(lambda: backbone.predict(data.latents[:1], time_step, context))}


@torch.inference_mode(False)
def growth(host: Host, row: str, banks: Sequence[ConceptBank], config: TrainingConfig, steps: int) -> float:
    """Median of `steps` ratios: a step on top of the second bank over the one right before on top of the first. Whole looks are minutes
    apart, in which a machine's pace changes by more than what is asked."""
    method, settings = ROWS[row]
    backbone, ratios = host.backbone, []
    data = random_set(backbone, host.side)
    with host.training(), torch.enable_grad():
        runs = [Run(Task(NEW, NOUN, backbone, bank), make(method, settings), data, config) for bank in banks]
        standing = [learning_deltas(bank, METHODS, method) for bank in banks]
        for _ in range(steps + 1):
            times = []
            for run, deltas in zip(runs, standing, strict=True):
                with backbone.folded(deltas):
                    began = time.perf_counter()
                    run.step()
                    times.append(time.perf_counter() - began)
            ratios.append(times[1] / times[0])
    return statistics.median(ratios[1:])


def measure(host: Host, pixels: int, steps: int, rounds: int, tell: Callable[[str], object], precision: str = "float32") -> dict:
    """The JSON of the benchmark; the host has no model any more afterwards. Ratios are of looks right after each other, their median over
    rounds: a machine's pace drifts."""
    config = TrainingConfig(steps=steps, resolution=pixels, precision=precision)
    looks: dict[tuple[str, int], list[tuple[dict, Look]]] = {}
    with TemporaryDirectory() as name:
        banks = {(row, count): stored_bank(host.backbone.layout, ROWS[row][0], count, Path(name))
                 for row in ROWS for count in (CONCEPTS if row in GROWING else CONCEPTS[:1])}
        for i in range(rounds):
            for (row, count), bank in banks.items():
                pair = forward_look(host, row), step_look(host, row, bank, config)
                looks.setdefault((row, count), []).append(pair)
                tell(f"round {i + 1}, {row}, {count} in the bank: {min(pair[1]['seconds']):.2f} s a step, "
                     f"forward {pair[0]['forward_seconds']:.2f} s, text {pair[0]['text_seconds']:.2f} s")
        grown = {row: growth(host, row, [banks[row, count] for count in CONCEPTS], config, steps * rounds) for row in GROWING}
    rivals, others = {}, host.rivals()
    host.backbone = None      # our model is no part of what others need
    gc.collect()
    for name, look in others.items():
        rivals[name] = look(steps)
        tell(f"{name}: {min(rivals[name]['seconds']):.2f} s a step")
    return _told(pixels, looks, grown, rivals)


def _told(pixels: int, looks: Mapping, grown: Mapping[str, float], rivals: Mapping[str, Look]) -> dict:
    rows: dict[str, dict] = {}
    for row in ROWS:
        found = {concepts: _row(looks[row, concepts]) for concepts in CONCEPTS if (row, concepts) in looks}
        rows[row] = found[CONCEPTS[0]] | {"concepts": {str(concepts): one for concepts, one in found.items()}}
        if len(found) > 1:
            rows[row]["hundred_over_one"] = grown[row]
            rows[row]["peak_hundred_over_one"] = _ratio(found[CONCEPTS[1]]["peak_gb"], found[CONCEPTS[0]]["peak_gb"])
    others = {name: {"step_seconds": min(look["seconds"]), "peak_gb": look["peak_gb"]} for name, look in rivals.items()}
    for row in rows.values():
        for name, other in others.items():
            row[f"faster_than_{name}"] = other["step_seconds"] / row["step_seconds"]
            row[f"peak_over_{name}"] = _ratio(row["peak_gb"], other["peak_gb"])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return {"shape": "sd15", "pixels": pixels, "device": device, **rows[next(iter(ROWS))], **others, "rows": rows}


def _row(pairs: list[tuple[dict, Look]]) -> dict:
    peaks = [look["peak_gb"] for _, look in pairs if look["peak_gb"] is not None]
    return {
        "forward_seconds": min(forwards["forward_seconds"] for forwards, _ in pairs),
        "text_seconds": min(forwards["text_seconds"] for forwards, _ in pairs),
        "step_seconds": min(min(look["seconds"]) for _, look in pairs),
        "step_over_forwards": statistics.median(min(look["seconds"]) / sum(forwards.values()) for forwards, look in pairs),
        "peak_gb": min(peaks) if peaks else None,
    }


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

"""Compares the memory plan with measured peaks, on checkpoints' shapes with random weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from ...core.bank.bank import ConceptBank
from ...core.methods import DEFAULT
from ...core.methods.base import Task, make
from ...core.training.memory import return_freed_memory
from ...core.training.memory_plan import Measures
from ...core.training.planning import activation_bytes, concept_bytes
from ...core.training.trainer import Trainer
from .synthetic import held_gb, peak_gb
from .training import NEW, NOUN, Host, random_set

MEASURES = {"none": Measures(), "micro-batches of 1": Measures(rows=1),
            "gradient checkpointing": Measures(checkpointing=True)}
BATCH = 2      # pictures; micro-batches need more than one


def measure(host: Host, steps: int, report: Callable[[str], object]) -> dict:
    """Runs the benchmark and returns its JSON.

    Args:
        host: Model and setup. Its text encoder stays in memory.
        steps: Steps with each measure; the first one encodes the captions.
        report: Called with a line per measure.

    Returns:
        `rows`: by measure, GiB planned and measured, and seconds of the fastest step. Measured are the
            weights and what the steps take beyond what was held before them. What Python holds does not
            count.
    """
    backbone, data = host.backbone, random_set(host.backbone, host.setup.side)
    config, rows = replace(host.setup.training(steps), batch_size=BATCH), {}
    for name, measures in MEASURES.items():
        with torch.inference_mode(False), host.training():
            trainer = Trainer(Task(NEW, NOUN, backbone, ConceptBank(backbone.layout)), make(DEFAULT), data,
                              config)
            trainer.take(measures)
            rows[name] = _row(trainer, host.weights, steps)
        report(_line(name, rows[name]))
    device = f"cpu, {torch.get_num_threads()} threads"
    return {**asdict(host.setup), "method": DEFAULT, "batch": BATCH, "weights": backbone.parameter_count,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else device, "rows": rows}


def _row(trainer: Trainer, weights: int, steps: int) -> dict:
    """weights: bytes of all models in memory."""
    with trainer.session():
        activations = activation_bytes(trainer)(trainer.measures)
        seconds: list[float] = []
        planned = (weights + concept_bytes(trainer) + activations) / 2**30

        def run() -> None:
            for _ in range(steps):
                start = time.perf_counter()
                trainer.step()
                seconds.append(time.perf_counter() - start)

        return_freed_memory()
        held, peak = held_gb(), peak_gb(run)
    row = {"planned_gb": planned, "activations_gb": activations / 2**30,
           "step_seconds": min(seconds), "measured_gb": None, "planned_over_measured": None}
    if held is not None and peak is not None:
        row["measured_gb"] = measured = weights / 2**30 + peak - held
        row["planned_over_measured"] = planned / measured
    return row


def _line(name: str, row: dict) -> str:
    measured = "not known" if row["measured_gb"] is None else f"{row['measured_gb']:.2f} GB"
    return f"{name}: planned {row['planned_gb']:.2f} GB, measured {measured}"


def table(result: dict) -> list[str]:
    """The table of several shapes, in Markdown."""
    lines = ["| shape | weights | pixels | measure | planned, GB | measured, GB | planned / measured |",
             "|---|---|---|---|---|---|---|"]
    for shape in result.values():
        size = f"{shape['weights'] / 1e9:.2f} billion, {shape['base'] or 'float32'}"
        name = shape["shape"] + (f", {shape['blocks']} blocks" if shape["blocks"] else "")
        lines += [f"| {name} | {size} | {shape['pixels']} | {measure} | {row['planned_gb']:.2f} | "
                  f"{row['measured_gb']:.2f} | {row['planned_over_measured']:.2f} |"
                  for measure, row in shape["rows"].items() if row["measured_gb"] is not None]
    return lines

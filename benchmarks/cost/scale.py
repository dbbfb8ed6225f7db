"""Measures the cost of many concepts in a prompt and in a file, on Stable Diffusion 1.5's shape."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

from ...core.bank.bank import ConceptBank, Entry
from ...core.bank.format import open_bank, save_bank
from ...core.conditioning.routing import MODES, aggregate
from ...core.model.backbone import Backbone
from .synthetic import context_of, seconds
from .training import random_bank


def naive(backbone: Backbone, bank: ConceptBank) -> None:
    """Baseline: one product and one addition per concept and projection, as in published code.

    """
    weight = 1 / len(bank)
    for site in backbone.layout.sites:
        for projection in ("to_q", "to_k", "to_v", "to_out"):
            total = torch.zeros(site.shape(projection))
            for concept in bank:
                total += weight * concept.deltas[site.index, projection].dense()


@torch.inference_mode()
def aggregation(backbone: Backbone, concepts: int, rounds: int) -> dict:
    """Runs the benchmark and returns its JSON.

    Args:
        backbone: The base.
        concepts: Number of concepts in the bank.
        rounds: Number of measurements.

    Returns:
        `apply_seconds`: by mode, from the prompt to folded weights; in mode sharp only the prompt's two
            concepts act.
        `naive_seconds`: the sum alone, concept by concept. `sampling_over_plain`: a forward pass with folded
            deltas over
        one without, median of pairs.
    """
    bank = random_bank(backbone.layout, "cidm", concepts)
    prompt = bank.parse("a photo of <old0> with <old1> in a park")
    x = torch.randn(1, backbone.latent_channels, 64, 64,
                    generator=torch.Generator().manual_seed(1)).to(backbone.device)
    steps = torch.tensor([500], device=backbone.device)
    result: dict = {"concepts": concepts, "apply_seconds": {}}

    def apply(mode: str):
        deltas = aggregate(backbone, bank, prompt, mode).deltas
        with backbone.folded(deltas):
            pass
        return deltas

    for mode in MODES:
        result["apply_seconds"][mode] = seconds(lambda mode=mode: apply(mode), rounds)
    result["naive_seconds"] = seconds(lambda: naive(backbone, bank), 1)
    result["sampling_over_plain"] = _sampling_ratio(backbone, apply("equal"), x, steps, rounds)
    return result


def _sampling_ratio(backbone: Backbone, deltas, x, steps, rounds: int) -> float:
    context, ratios = context_of(1, 1, seed=1), []

    def forward() -> float:
        return seconds(lambda: backbone.predict(x, steps, context), 2)

    for _ in range(rounds):
        plain = forward()
        with backbone.folded(deltas):
            ratios.append(forward() / plain)
    return statistics.median(ratios)


def bank(backbone: Backbone, concepts: int, folder: Path, rounds: int) -> dict:
    """Saves a bank in `folder` and measures reading it.

    Returns:
        `open_seconds`: opening and listing; `one_seconds`: opening and reading one concept; `all_seconds`:
            reading all.
    """
    path = folder / f"bank-{concepts}.safetensors"
    save_bank(_repeated(random_bank(backbone.layout, "bound", 8), concepts), path)

    def listed() -> list:
        return [(info.name, info.class_noun, info.placeholder) for info in open_bank(path).infos.values()]

    return {
        "concepts": concepts,
        "open_seconds": seconds(listed, rounds),
        "one_seconds": seconds(lambda: open_bank(path)[f"old{concepts - 1}"], rounds),
        "all_seconds": seconds(lambda: list(open_bank(path)), 1),
        "concept_mb": path.stat().st_size / concepts / 1e6,
    }


def _repeated(few: ConceptBank, count: int) -> ConceptBank:
    """`count` concepts that reuse the tensors of a few."""
    originals = list(few)
    renamed = (originals[i % len(originals)].renamed(f"old{i}") for i in range(count))
    return ConceptBank(few.layout,
                       tuple(Entry(concept.info, lambda concept=concept: concept) for concept in renamed))

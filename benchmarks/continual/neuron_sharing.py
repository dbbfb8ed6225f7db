"""`python -m continual_concepts.benchmarks neurons`: how many base neurons of one prompt are also those of others.

The observation is that of CNS (Liao et al., ICCV 2025, arXiv 2510.02296): about 53 % of base neurons stay shared as more prompts are added,
which is why it takes general neurons out. Only the figure was available to us, from a summary: not its model, score, threshold, prompts
or what exactly is counted. Ours: the embedded base in place of Stable Diffusion; base neurons as in `neurons.base_neurons`, the top 10 %
of every W_k and W_v; both scores and both units; the calibration prompts; and two ways to count a neuron of the first prompt as shared: it
is a base neuron of every prompt so far, or of half of them or more (the vote of `neurons.Votes`, which includes the first prompt). By
chance the first share falls to 10 % with the second prompt. What another picture of the very same prompt shares is measured beside it: the
gradient score sees pictures, and even those of one prompt differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...core.demo.networks import LATENT_SIZE
from ...core.errors import ConceptError
from ...core.model.backbone import Backbone
from ...core.neurons.neurons import UNITS, Scores, base_neurons
from ...core.neurons.scores import CALIBRATION, SCORES, activation_scores, encode_plain, gradient_scores, imagine, text_positions

PAPER = 0.53
SHARE, QUORUM = 0.1, 0.5      # CNSConfig's
COLOURS, LINES, QUIET = {"gradient": "#c2410c", "activation": "#1d4ed8"}, {"weight": "-", "row": "--"}, "#6b6b76"


def shares_of_first(masks: Tensor, first: int) -> tuple[list[float], list[float]]:
    """Of the base neurons of prompt `first`, the share that is shared after 1, 2, ... P prompts, itself the first and the others in turn:
    by all prompts so far, and by QUORUM of them or more. masks `[P, N]` bool: prompt, place."""
    own = masks.roll(-first, 0)[:, masks[first]].float()      # the first prompt's places alone: row 0 is all ones
    count = torch.arange(1, len(masks) + 1).unsqueeze(1)
    votes = own.cumsum(0)
    return (votes == count).float().mean(1).tolist(), (votes >= QUORUM * count).float().mean(1).tolist()


def _flat(scores: Scores, unit: str) -> Tensor:
    """Base neurons of all weights side by side, `[N]` bool."""
    found = base_neurons(scores, SHARE, unit)
    return torch.cat([found.mask(key).flatten() for key in sorted(found.sizes)])


def base_masks(backbone: Backbone, prompts: Sequence[str], draws: int, seed: int,
               progress: Callable[[int, int], None] | None = None) -> dict[str, Tensor]:
    """Base neurons of every prompt, `score-unit` -> `[P, N]` bool. Gradients are of the base's own picture of the prompt."""
    found: dict[str, list[Tensor]] = {f"{score}-{unit}": [] for score in SCORES for unit in UNITS}
    generator = torch.Generator().manual_seed(seed)
    for i, prompt in enumerate(prompts):
        context, latents = encode_plain(backbone, [prompt]), imagine(backbone, prompt, (LATENT_SIZE, LATENT_SIZE), generator)
        scores = {"gradient": gradient_scores(backbone, latents, context, generator, draws),
                  "activation": activation_scores(backbone, context, text_positions(backbone, [prompt]))}
        for name, masks in found.items():
            score, unit = name.split("-")
            masks.append(_flat(scores[score], unit))
        if progress is not None:
            progress(i + 1, len(prompts))
    return {name: torch.stack(masks) for name, masks in found.items()}


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [round(sum(values) / len(values), 4) for values in zip(*rows, strict=True)]


def neuron_sharing(backbone: Backbone, prompts: Sequence[str] = CALIBRATION, firsts: int = 8, draws: int = 16, seed: int = 0,
                   progress: Callable[[int, int], None] | None = None) -> dict:
    """Means over `firsts` first prompts, evenly from the list. shares: by all prompts so far; general: by half of them or more;
    same_prompt: by another picture of the first prompt itself."""
    if not 1 <= firsts <= len(prompts) or draws < 1:
        raise ConceptError(f"first prompts and draws are {firsts} and {draws}; allowed: 1 to {len(prompts)}, 1 or more")
    chosen = [i * len(prompts) // firsts for i in range(firsts)]
    masks = base_masks(backbone, prompts, draws, seed, progress)
    again = base_masks(backbone, [prompts[i] for i in chosen], draws, seed + 1)
    curves = {name: [shares_of_first(mask, first) for first in chosen] for name, mask in masks.items()}
    return {
        "prompts": list(range(1, len(prompts) + 1)),
        "shares": {name: _means([every for every, _ in found]) for name, found in curves.items()},
        "general": {name: _means([half for _, half in found]) for name, found in curves.items()},
        "same_prompt": {name: round(float((masks[name][chosen] & own).sum() / own.sum()), 4) for name, own in again.items()},
        "paper": PAPER,
        "base_share": SHARE,
        "quorum": QUORUM,
        "first_prompts": [prompts[i] for i in chosen],
        "draws": draws,
        "seed": seed,
    }


def _panel(axis, prompts: Sequence[int], curves: Mapping[str, Sequence[float]], title: str) -> None:
    for name, values in curves.items():
        score, unit = name.split("-")
        axis.plot(prompts, values, color=COLOURS[score], ls=LINES[unit], lw=1.8, label=f"{score}, {unit}s")
    axis.axhline(PAPER, color=QUIET, lw=1, ls=":", label="CNS tells of 53 %")
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("prompts", fontsize=9)
    axis.set_ylim(0, 1.02)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def draw(path: Path, result: Mapping) -> None:
    """Writes the PNG: both ways to count, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, result["prompts"], result["shares"], "Shared by all prompts so far")
    _panel(right, result["prompts"], result["general"], "Shared by half of the prompts or more")
    left.set_ylabel("of the first prompt's base neurons", fontsize=9)
    figure.legend(*right.get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside right center")
    figure.savefig(path)

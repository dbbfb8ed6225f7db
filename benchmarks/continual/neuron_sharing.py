"""Measures how many base neurons of one prompt are also base neurons of other prompts.

CNS (Liao et al., ICCV 2025, arXiv 2510.02296) observes that about 53 % of base neurons stay shared as more
prompts are added. This is why CNS removes general neurons. Only this figure was available to us, but not its
model, score, threshold, prompts or counting rule.

We use the embedded base instead of Stable Diffusion, both scores, both units, and the calibration prompts.
Base neurons are the top 10 % of every W_k and W_v, see `neurons.base_neurons`. A neuron of the first prompt
counts as shared in two ways: if it is a base neuron of every prompt so far, or of at least half of them (the
vote of `neurons.Votes`, which includes the first prompt). For random neurons, the first share would fall to
10 % with the second prompt. As a reference we measure how many neurons another picture of the same prompt
shares, because the gradient score depends on the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...core.errors import ConceptError
from ...core.hosts.diffusers import DiffusersBackbone
from ...core.neurons.neurons import UNITS, Scores, base_neurons
from ...core.neurons.scores import (
    CALIBRATION,
    SCORES,
    activation_scores,
    encode_plain,
    gradient_scores,
    imagine,
    text_positions,
)

PAPER = 0.53
SHARE, QUORUM = 0.1, 0.5      # as in CNSConfig
COLOURS, QUIET = {"gradient": "#c2410c", "activation": "#1d4ed8"}, "#6b6b76"
LINES = {"weight": "-", "row": "--"}


def shares_of_first(masks: Tensor, first: int) -> tuple[list[float], list[float]]:
    """Fractions of one prompt's base neurons that are shared after 1, 2, ... P prompts.

    Args:
        masks: `[P, N]` bool, prompt by neuron.
        first: Index of the first prompt; the others follow cyclically.

    Returns:
        The fraction shared by all prompts so far, and the fraction shared by at least QUORUM of them.
    """
    # keep only the first prompt's neurons, so that row 0 is all ones
    neurons = masks.roll(-first, 0)[:, masks[first]].float()
    count = torch.arange(1, len(masks) + 1).unsqueeze(1)
    votes = neurons.cumsum(0)
    return (votes == count).float().mean(1).tolist(), (votes >= QUORUM * count).float().mean(1).tolist()


def _flat(scores: Scores, unit: str) -> Tensor:
    """Base neurons of all weights, concatenated, `[N]` bool."""
    neurons = base_neurons(scores, SHARE, unit)
    return torch.cat([neurons.mask(key).flatten() for key in sorted(neurons.sizes)])


def base_masks(backbone: DiffusersBackbone, prompts: Sequence[str], draws: int, seed: int,
               progress: Callable[[int, int], None] | None = None) -> dict[str, Tensor]:
    """Base neurons of every prompt: `score-unit` -> `[P, N]` bool.

    The gradient score uses a picture of the prompt sampled from the base.
    """
    collected: dict[str, list[Tensor]] = {f"{score}-{unit}": [] for score in SCORES for unit in UNITS}
    generator = torch.Generator().manual_seed(seed)
    side = backbone.picture_size // backbone.picture_multiple
    for i, prompt in enumerate(prompts):
        context = encode_plain(backbone, [prompt])
        latents = imagine(backbone, prompt, (side, side), generator)
        scores = {"gradient": gradient_scores(backbone, latents, context, generator, draws),
                  "activation": activation_scores(backbone, context, text_positions(backbone, [prompt]))}
        for name, masks in collected.items():
            score, unit = name.split("-")
            masks.append(_flat(scores[score], unit))
        if progress is not None:
            progress(i + 1, len(prompts))
    return {name: torch.stack(masks) for name, masks in collected.items()}


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [round(sum(values) / len(values), 4) for values in zip(*rows, strict=True)]


def neuron_sharing(backbone: DiffusersBackbone, prompts: Sequence[str] = CALIBRATION, firsts: int = 8,
                   draws: int = 16, seed: int = 0,
                   progress: Callable[[int, int], None] | None = None) -> dict:
    """Runs the benchmark: means over several first prompts.

    Args:
        backbone: The base.
        prompts: The P prompts.
        firsts: Number of first prompts, evenly spread over the list.
        draws: Gradients per prompt.
        seed: Seed of the gradients' noise and pictures.
        progress: Called with the number of finished prompts and P.

    Returns:
        The benchmark's JSON. `shares`: shared by all prompts so far; `general`: by at least half of them;
        `same_prompt`: by another picture of the first prompt.
    """
    if not 1 <= firsts <= len(prompts) or draws < 1:
        raise ConceptError(f"first prompts and draws are {firsts} and {draws}; allowed: "
                           f"1 to {len(prompts)}, 1 or more")
    chosen = [i * len(prompts) // firsts for i in range(firsts)]
    masks = base_masks(backbone, prompts, draws, seed, progress)
    again = base_masks(backbone, [prompts[i] for i in chosen], draws, seed + 1)
    curves = {name: [shares_of_first(mask, first) for first in chosen] for name, mask in masks.items()}
    return {
        "prompts": list(range(1, len(prompts) + 1)),
        "shares": {name: _means([every for every, _ in pairs]) for name, pairs in curves.items()},
        "general": {name: _means([half for _, half in pairs]) for name, pairs in curves.items()},
        "same_prompt": {name: round(float((masks[name][chosen] & mask).sum() / mask.sum()), 4)
                        for name, mask in again.items()},
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
    axis.axhline(PAPER, color=QUIET, lw=1, ls=":", label="CNS reports 53 %")
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("prompts", fontsize=9)
    axis.set_ylim(0, 1.02)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def draw(path: Path, result: Mapping) -> None:
    """Writes the PNG with both counting rules side by side."""
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

"""The figures of a run: single concepts, several concepts in one prompt, base change, and costs."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import Tensor

from ...core.bank.bank import ConceptBank
from ...core.data.assignment import Assignment
from ...core.evaluation import metrics
from ...core.evaluation.protocol import measure
from ...core.model.backbone import Backbone
from ...core.model.deltas import Delta, SparseDelta
from ...core.sampling.sampling import sample
from .combined import Combined, assign_strips, similarities
from .prompt_suite import PromptSuite
from .runs import Progress

FIRST_UNRELATED_SEED = 7000
# features of a concept's pictures [B, D], image and text alignment
Evaluation = tuple[Tensor, float, float]


def evaluate_concept(backbone: Backbone, bank: ConceptBank, suite: PromptSuite,
                     task: Assignment) -> Evaluation:
    """Samples and evaluates a concept. Pictures are not stored, because a thousand of 512 pixels take 3 GB.
    """
    pictures, image, text = measure(backbone, bank, task, task.prompts, suite.encoder, suite.settings,
                                    suite.seeds)
    return suite.encoder.features(pictures, task.kind), image, text


def concept_figures(suite: PromptSuite, progress: Progress, tasks: Sequence[Assignment],
                    final: Sequence[Evaluation]) -> dict:
    """Figures of single concepts in learning order. final: evaluations at the end of the sequence."""
    just, last = [image for image, _ in progress.just], [image for _, image, _ in final]
    features = [seen for seen, _, _ in final]
    real = [suite.encoder.features(task.references, task.kind) for task in tasks]
    first = [torch.tensor(rows) for rows in progress.features]
    objects = [i for i, task in enumerate(tasks) if task.kind == "object"]
    return {
        "just_learned": just,
        "image_alignment": last,
        "text_alignment": [text for _, _, text in final],
        "retention": [b / a for a, b in zip(just, last, strict=True)],
        "forgetting": [a - b for a, b in zip(just, last, strict=True)],
        "a_mmd": metrics.a_mmd(real, features),
        "f_mmd": metrics.f_mmd(first, features),
        "bleed": metrics.confusion([features[i] for i in objects], [real[i] for i in objects]).tolist(),
    }


def _combined(backbone: Backbone, bank: ConceptBank, suite: PromptSuite, group: Sequence[str],
              seeds: Sequence[int]) -> Combined:
    listed = ", ".join(f"<{name}>" for name in group[:-1]) + f" and <{group[-1]}>"
    prompts = [suite.combined[i % len(suite.combined)].format(listed) for i in range(len(seeds))]
    pictures = sample(backbone, bank, prompts, seeds, suite.settings)
    references = [suite.encoder.features(suite.named(name).references, "object") for name in group]
    scores = similarities(pictures, references, lambda images: suite.encoder.features(images, "object"))
    return assign_strips(scores, [suite.levels[name] for name in group])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def group_figures(backbone: Backbone, bank: ConceptBank, suite: PromptSuite) -> dict:
    """Figures for two and three concepts of different classes in one prompt.

    Empty if the bank has no complete group.
    """
    groups = [group for group in suite.groups if all(name in bank for name in group)]
    results = [_combined(backbone, bank, suite, group, suite.group_seeds) for group in groups]
    if not results:
        return {}
    return {"multi_alignment": mean([float(result.alignment.mean()) for result in results]),
            "multi_present": mean([float(result.present.float().mean()) for result in results])}


def pairs_of(suite: PromptSuite, names: ConceptBank | Container[str]) -> list[tuple[str, ...]]:
    """The suite's same-class pairs whose two concepts are both in `names`."""
    return [pair for pair in suite.pairs if all(name in names for name in pair)]


def pair_figures(backbone: Backbone, bank: ConceptBank, suite: PromptSuite) -> dict:
    """Figures for two concepts of one class in one prompt.

    Confusion is a yes or no per picture, so comparing methods takes many pictures. The number of pictures is
    therefore reported.
    """
    results = [_combined(backbone, bank, suite, pair, suite.pair_seeds) for pair in pairs_of(suite, bank)]
    if not results:
        return {}
    return {"pair_alignment": mean([float(result.alignment.mean()) for result in results]),
            "confusion": mean([float(result.confused.float().mean()) for result in results]),
            "pair_pictures": len(results) * len(suite.pair_seeds)}


def base_change(backbone: Backbone, bank: ConceptBank, suite: PromptSuite) -> float:
    """Mean change of pictures whose prompts name no concept."""
    seeds = list(range(FIRST_UNRELATED_SEED, FIRST_UNRELATED_SEED + len(suite.unrelated)))
    empty = ConceptBank(backbone.layout)
    before, after = (sample(backbone, b, suite.unrelated, seeds, suite.settings) for b in (empty, bank))
    return metrics.base_change(before, after)


def _weight_count(delta: Delta) -> int:
    """Number of weights in a delta, without the indices of sparse deltas."""
    return delta.values.numel() if isinstance(delta, SparseDelta) else delta.up.numel() + delta.down.numel()


def cost_figures(suite: PromptSuite, progress: Progress, bank: ConceptBank) -> dict:
    shared = sum(tensor.numel() * tensor.element_size() for state in bank.shared.values()
                 for tensor in state.values())
    stored = sum(_weight_count(delta) for concept in bank for delta in concept.deltas.values())
    return {
        "seconds_per_concept": mean(progress.seconds),
        "bytes_per_concept": (sum(progress.bytes) + shared) / len(bank),
        "trained_share": stored / len(bank) / suite.unet_weights,
    }

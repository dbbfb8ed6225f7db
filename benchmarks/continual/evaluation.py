"""The figures of a run: single concepts, several concepts in one prompt, base change, and costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...core.bank.bank import ConceptBank
from ...core.data.assignment import Assignment
from ...core.evaluation import metrics
from ...core.model.deltas import Delta, SparseDelta
from .judged import alone_scores, features_of, groups_of, judged, of_bank, scores_of, together_figures
from .pictures import Sampler
from .prompt_suite import PromptSuite
from .runs import Progress

FIRST_UNRELATED_SEED = 7000


def concept_pictures(sampler: Sampler, bank: ConceptBank, suite: PromptSuite, task: Assignment) -> Tensor:
    """Pictures `[B, 3, H, W]` of a concept, one per seed; its prompts take turns."""
    prompts = [task.prompts[i % len(task.prompts)] for i in range(len(suite.seeds))]
    return sampler.sample(bank, prompts, suite.seeds, suite.settings)


def just_learned(sampler: Sampler, bank: ConceptBank, suite: PromptSuite,
                 task: Assignment) -> tuple[dict[str, float], list[list[float]]]:
    """Right after learning: judge -> mean score of a concept's pictures, and the pictures' features."""
    pictures = concept_pictures(sampler, bank, suite, task)
    features = features_of(suite, pictures, task.kind).tolist()
    return alone_scores(suite, pictures, task.name), [[round(x, 5) for x in row] for row in features]


def _text_alignment(suite: PromptSuite, bank: ConceptBank, task: Assignment, pictures: Tensor) -> list[float]:
    """The text alignment of a concept's pictures, in a list; an empty list if the encoder reads no texts."""
    if not suite.encoder.reads_texts:
        return []
    prompts = [bank.parse(task.prompts[i % len(task.prompts)]) for i in range(len(pictures))]
    texts = suite.encoder.caption_features([prompt.plain(bank.infos) for prompt in prompts])
    return [metrics.text_alignment(suite.encoder.image_text_features(pictures), texts)]


def final_figures(sampler: Sampler, banks: Mapping[str, ConceptBank], bank: ConceptBank, suite: PromptSuite,
                  progress: Progress, alone: bool) -> dict:
    """Figures at the end of the sequence, of single concepts and of several in one prompt.

    A_MMD compares with held-out real pictures, where there are some. C-LoRA's paper takes CLIP's features;
    here they are the suite's encoder's.

    Args:
        sampler: Samples the pictures.
        banks: Concept -> the bank that draws it alone.
        bank: The bank that draws several.
        suite: Prompts, seeds and judges.
        progress: Figures right after learning.
        alone: Whether every concept has a bank of its own, so that there are no pictures of several.
    """
    tasks = [suite.named(name) for name in progress.names]
    rows, last, text = [], [], []
    for task in tasks:      # one concept at a time, because a thousand pictures of 512 pixels take 3 GB
        pictures = concept_pictures(sampler, banks[task.name], suite, task)
        rows.append(scores_of(suite, pictures, progress.names))
        last.append(features_of(suite, pictures, task.kind))
        text.extend(_text_alignment(suite, banks[task.name], task, pictures))
    draw = of_bank(sampler, bank, suite) if not alone else lambda *_: None
    figures = judged(suite, progress.names, rows, draw)
    for name in suite.judges:
        figures[name]["just"] = [scores[name] for scores in progress.just]
    real = [suite.encoder.features(task.held_out if len(task.held_out) else task.references, task.kind)
            for task in tasks]
    first = [torch.tensor(rows) for rows in progress.features]
    return {
        "kinds": [task.kind for task in tasks],
        "judges": figures,
        "text_alignment": text,
        "a_mmd": metrics.a_mmd(real, last),
        "f_mmd": metrics.f_mmd(first, [features.cpu() for features in last]),
        "pair_pictures": 0 if alone else pair_pictures(suite, progress.names),
        "base_change": base_change(sampler, bank, suite),
    }


def pair_pictures(suite: PromptSuite, names: Sequence[str]) -> int:
    """Number of pictures of two concepts of one class."""
    return len(groups_of(suite, names, pairs=True)) * len(suite.pair_seeds)


def with_other_pairs(sampler: Sampler, bank: ConceptBank, suite: PromptSuite, finished: Mapping) -> dict:
    """A finished run with the figures of the suite's pairs, drawn by the run's bank."""
    pairs = together_figures(suite, bank, of_bank(sampler, bank, suite), pairs=True)
    judges = {name: {**figures, "pairs": pairs[name]} for name, figures in finished["judges"].items()}
    return {**finished, "judges": judges, "pair_pictures": pair_pictures(suite, finished["concepts"])}


def base_change(sampler: Sampler, bank: ConceptBank, suite: PromptSuite) -> float:
    """Mean change of pictures whose prompts name no concept."""
    seeds = list(range(FIRST_UNRELATED_SEED, FIRST_UNRELATED_SEED + len(suite.unrelated)))
    empty = ConceptBank(sampler.backbone.layout)
    before, after = (sampler.sample(b, suite.unrelated, seeds, suite.settings) for b in (empty, bank))
    return metrics.base_change(before, after)


def _weight_count(delta: Delta) -> int:
    """Number of weights in a delta, without the indices of sparse deltas."""
    if isinstance(delta, SparseDelta):
        return delta.values.numel()
    return sum(tensor.numel() for tensor in delta.tensors())


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def cost_figures(suite: PromptSuite, progress: Progress, bank: ConceptBank) -> dict:
    shared = sum(tensor.numel() * tensor.element_size() for state in bank.shared.values()
                 for tensor in state.values())
    stored = sum(_weight_count(delta) for concept in bank for delta in concept.deltas.values())
    return {
        "seconds_per_concept": mean(progress.seconds),
        "bytes_per_concept": (sum(progress.bytes) + shared) / len(bank),
        "trained_share": stored / len(bank) / suite.unet_weights,
    }

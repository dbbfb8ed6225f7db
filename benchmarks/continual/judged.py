"""Figures of all judges for pictures of one concept and of several: of runs, the floor and the ceiling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...core.bank.bank import ConceptBank
from ...core.evaluation import metrics
from ...core.evaluation.combined import assign_strips, strip_scores
from .judges import Judge
from .pictures import Sampler
from .prompt_suite import PromptSuite, prompts_together

Draw = Callable[[tuple[str, ...], Sequence[int]], Tensor | None]      # names and seeds -> pictures of them


def alone_scores(suite: PromptSuite, pictures: Tensor, name: str) -> dict[str, float]:
    """Judge -> mean score of pictures `[B, 3, H, W]` for one concept."""
    return {judge: float(measure.scores(pictures, [name]).mean()) for judge, measure in suite.judges.items()}


def scores_of(suite: PromptSuite, pictures: Tensor, names: Sequence[str]) -> dict[str, list[float]]:
    """Judge -> mean score of the pictures `[B, 3, H, W]` of one concept for every concept in `names`."""
    return {name: judge.scores(pictures, names).mean(0).tolist() for name, judge in suite.judges.items()}


def _together(judge: Judge, group: tuple[str, ...], pictures: Tensor) -> dict:
    scores = strip_scores(pictures, len(group), lambda images: judge.scores(images, group))
    found = assign_strips(scores)
    return {"concepts": list(group), "alignment": found.alignment.mean(0).tolist(),
            "confused": float(found.confused.float().mean()), "bleed": found.bleed.mean(0).tolist()}


def groups_of(suite: PromptSuite, names: Sequence[str] | ConceptBank, pairs: bool) -> list[tuple[str, ...]]:
    """The suite's groups, or its pairs of one class, whose concepts are all in `names`."""
    return [group for group in (suite.pairs if pairs else suite.groups) if all(n in names for n in group)]


def together_figures(suite: PromptSuite, names: Sequence[str] | ConceptBank, draw: Draw,
                     pairs: bool) -> dict[str, list[dict]]:
    """Judge -> the figures of each group, or of each pair of one class.

    Every figure is a mean over the group's pictures. `alignment` has one score per concept; `bleed` has the
    strip of the asked concept in rows and the shown concept in columns.

    Args:
        suite: Groups, pairs, seeds and judges.
        names: The concepts that were learned.
        draw: Draws a group; None where there is no such picture, and the group is left out.
        pairs: Whether the pairs are drawn, not the groups.
    """
    seeds = suite.pair_seeds if pairs else suite.group_seeds
    figures: dict[str, list[dict]] = {judge: [] for judge in suite.judges}
    for group in groups_of(suite, names, pairs):
        pictures = draw(group, seeds)
        if pictures is not None:
            for name, judge in suite.judges.items():
                figures[name].append(_together(judge, group, pictures))
    return figures


def judged(suite: PromptSuite, names: Sequence[str], rows: Sequence[Mapping[str, list[float]]],
           draw: Draw) -> dict[str, dict]:
    """Judge -> figures of pictures of single concepts and of several.

    `bleed` has the asked concepts in rows and the shown ones in columns; its diagonal is `alone`.

    Args:
        suite: Groups, pairs, seeds and judges.
        names: The concepts, in the order of the result.
        rows: For each concept, `scores_of` its pictures.
        draw: See `together_figures`.
    """
    groups, pairs = (together_figures(suite, names, draw, which) for which in (False, True))
    result = {}
    for judge in suite.judges:
        bleed = [row[judge] for row in rows]
        result[judge] = {"alone": [row[i] for i, row in enumerate(bleed)], "bleed": bleed,
                         "groups": groups[judge], "pairs": pairs[judge]}
    return result


def of_bank(sampler: Sampler, bank: ConceptBank, suite: PromptSuite) -> Draw:
    """Draws groups with a bank, without regions."""
    def draw(group: tuple[str, ...], seeds: Sequence[int]) -> Tensor:
        return sampler.sample(bank, prompts_together(suite, group, len(seeds)), seeds, suite.settings)
    return draw


def floor_and_ceiling(sampler: Sampler, suite: PromptSuite) -> dict:
    """The rows between which all methods lie, as JSON.

    `floor`: pictures of the base whose prompts hold class nouns instead of concepts. `ceiling`: real pictures
    that nothing was trained on. Groups and pairs have a ceiling only where the suite has real pictures of
    them. Without held-out pictures, training pictures are compared with one another.
    """
    empty, names = ConceptBank(sampler.backbone.layout), [task.name for task in suite.tasks]
    floors, ceilings, text = [], [], []
    for task in suite.tasks:
        seeds = suite.noun_seeds or suite.seeds
        prompts = [task.noun_prompts[i % len(task.noun_prompts)] for i in range(len(seeds))]
        pictures = sampler.sample(empty, prompts, seeds, suite.settings)
        floors.append(scores_of(suite, pictures, names))
        ceilings.append(scores_of(suite, task.held_out if len(task.held_out) else task.references, names))
        if suite.encoder.reads_texts:
            text.append(metrics.text_alignment(suite.encoder.image_text_features(pictures),
                                               suite.encoder.caption_features(prompts)))

    def draw_nouns(group: tuple[str, ...], seeds: Sequence[int]) -> Tensor:
        prompts = prompts_together(suite, group, len(seeds), nouns=True)
        return sampler.sample(empty, prompts, seeds, suite.settings)

    floor = judged(suite, names, floors, draw_nouns)
    ceiling = judged(suite, names, ceilings, lambda group, _: suite.together.get(group))
    for i, task in enumerate(suite.tasks):
        if not len(task.held_out):
            for name, judge in suite.judges.items():
                ceiling[name]["alone"][i] = ceiling[name]["bleed"][i][i] = judge.among_references(task.name)
    return {"concepts": names, "kinds": [task.kind for task in suite.tasks],
            "floor": {"judges": floor, "text_alignment": text},
            "ceiling": {"judges": ceiling}}


def features_of(suite: PromptSuite, pictures: Tensor, kind: str) -> Tensor:
    """The encoder's features `[B, D]`, rounded as they are stored."""
    return torch.round(suite.encoder.features(pictures, kind), decimals=5)

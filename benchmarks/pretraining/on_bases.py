"""The demo's concepts, learned by the default on several embedded bases and judged in one way."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ...core.bank.bank import ConceptBank
from ...core.cli.demo import figures_of, levels_of
from ...core.cli.demo_ways import TASKS, WAYS, Plan, banks_of, learn_job, noun_job, pictures_of, plan_of
from ...core.demo.judges import SceneEncoder
from ...core.evaluation import metrics
from ...core.sampling.sampling import sample
from ..report import load_or_make

WAY = "ours"
FIGURES = ("pair_closed", "confused", "boxes_right", "retained", "base_change")
UNRELATED = ("a photo of a cat on a beach", "a photo of a red car in the snow", "a photo of a robot at night",
             "an ink drawing of a fish", "a photo of a dog in a meadow", "a neon sign of a duck toy")
FIRST_UNRELATED_SEED = 7000
SAMPLER_STEPS = 15      # of the committed figures; the demo takes fewer


def base_change(plan: Plan, bank: ConceptBank) -> float:
    """Mean change of pictures whose prompts name no concept; 0 where they are the same bit for bit."""
    seeds = range(FIRST_UNRELATED_SEED, FIRST_UNRELATED_SEED + len(UNRELATED))
    before, after = (sample(plan.backbone, each, UNRELATED, seeds, plan.settings)
                     for each in (ConceptBank(bank.layout), bank))
    return metrics.base_change(before, after)


def measured(plan: Plan) -> dict:
    """Learns the concepts one after another and returns the figures of one seed."""
    encoder = SceneEncoder()
    levels = levels_of(plan, noun_job(plan), encoder)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seconds = sum(learn_job(plan, WAY, TASKS, folder).values())
        figures = figures_of(plan, pictures_of(plan, WAY, folder), levels, encoder)
        change = base_change(plan, banks_of(WAY, folder)[-1])
    return {**figures, "base_change": change, "seconds": seconds}


def mean(rows: Sequence[dict]) -> dict:
    """The mean over seeds of each figure, and of the share of each concept."""
    shares = [sum(row["gap_closed"][i] for row in rows) / len(rows) for i in range(len(TASKS))]
    return {"gap_closed": dict(zip(TASKS, shares, strict=True)),
            **{name: sum(row[name] for row in rows) / len(rows) for name in FIGURES}}


def compare(bases: Sequence[str], seeds: Sequence[int], pictures: int, steps: int | None,
            folder: Path) -> dict:
    """The figures of every base, as mean and per seed.

    Args:
        bases: Names of embedded bases.
        seeds: Of learning.
        pictures: Of each concept, pair and scene.
        steps: Of learning a concept; None = those of the demo on that base.
        folder: Folder of finished parts, which are not repeated.
    """
    result: dict = {"concepts": list(TASKS), "method": WAYS[WAY].method, "pictures": pictures, "bases": {}}
    for base in bases:
        plan, rows = plan_of(base), []
        plan = replace(plan, steps=steps or plan.steps, sampler_steps=SAMPLER_STEPS, alone=pictures,
                       together=pictures)
        for seed in seeds:
            own = replace(plan, seed=seed)
            name = "-".join(str(value) for value in asdict(own).values())
            figures = load_or_make(folder / f"{name}.json", lambda own=own: measured(own))
            rows.append({"seed": seed, **figures})
        result["bases"][base] = {"steps": plan.steps, "sampler_steps": plan.sampler_steps, **mean(rows),
                                 "runs": rows}
    return result


def lines_of(result: dict) -> list[str]:
    """One line per base."""
    return [f"{base}: " + ", ".join(f"<{name}> {share:.2f}" for name, share in row["gap_closed"].items())
            + f" of the way; pair {row['pair_closed']:.2f}, boxes {row['boxes_right']:.2f}, retained "
              f"{row['retained']:.3f}, base change {row['base_change']:g}"
            for base, row in result["bases"].items()]

"""Which trials tuning makes of a method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields

from ...core.methods import get
from . import style_rates
from .concepts import STYLES
from .embedded import STEPS, usual_settings
from .runs import STEPS as STEPS_KEY
from .runs import Run
from .tables import ALONE

SEED, SECOND_SEED, ORDER = 71, 72, 0      # none is used by the benchmark
RATE_FACTORS = (1.0, 0.25, 0.5, 2.0)      # on the usual rates of deltas and words
STRENGTH_FACTORS = (0.1, 10.0)      # on the usual strength
# for methods without a regulariser, on the rate of the words alone; textual_inversion has no other rate
WORD_FACTORS = (0.5, 2.0)
FIRST_STEPS = 100      # of the stages of rates and strength; half of `STEPS`, which takes half of the time
# on the best rates, with all the steps that a method may use: more steps often want a lower rate
MORE_STEPS_FACTORS = (1.0, 0.5)
STRENGTHS = {
    "cidm": "gamma1", "ccdm": "gamma_specific", "clora": "forget", "cns": "tie_previous",
    "custom_diffusion_merge": "ridge", "ewc": "tie", "l2dm": "mu", "lwf": "distil", "mix_of_show": "ridge",
    "scns": "risk", "stamina": "forget", "tara": "alignment",
}
Trial = dict[str, float | int]      # settings that differ from the usual ones, and `steps`


def strength_of(method: str) -> tuple[str, float] | None:
    """The setting that is the method's main regulariser, with its usual value; None if it has none."""
    name = STRENGTHS.get(method)
    if name is None or name not in {entry.name for entry in fields(get(method).config)}:
        return None
    value = getattr(get(method).config(**usual_settings(method)), name)
    return (name, value) if value else None


def _rates(method: str) -> list[Trial]:
    config = get(method).config(**usual_settings(method))
    usual = {"lr": config.lr, "token_lr": config.token_lr, STEPS_KEY: FIRST_STEPS}
    return [_faster(usual, factor) for factor in RATE_FACTORS]


def _faster(trial: Trial, factor: float) -> Trial:
    """The trial with `factor` times its rates."""
    return {**trial, "lr": trial["lr"] * factor, "token_lr": trial["token_lr"] * factor}


def stage_trials(method: str, stage: int, best: Trial) -> list[Trial]:
    """The trials of a stage: 0 rates, 1 strength, 2 steps. best: the best trial of earlier stages."""
    if stage == 0:
        return _rates(method)
    if stage == 2:
        return [{**_faster(best, factor), STEPS_KEY: STEPS} for factor in MORE_STEPS_FACTORS]
    strength = strength_of(method)
    if strength is None:
        return [{**best, "token_lr": best["token_lr"] * factor} for factor in WORD_FACTORS]
    name, usual = strength
    return [{**best, name: usual * factor} for factor in STRENGTH_FACTORS]


def finalists(results: Sequence[Mapping]) -> list[Trial]:
    """The best trial of each of the two best rates of deltas, of all trials that have an objective."""
    best: dict[float, Mapping] = {}
    for result in sorted((each for each in results if "objective" in each),
                         key=lambda result: -result["objective"]):
        best.setdefault(result["settings"]["lr"], result)
    return [result["settings"] for result in list(best.values())[:FINALISTS]]


def mean_of(trial: Trial, results: Sequence[Mapping], figure: str = "objective") -> float:
    """The mean figure of a trial's results over its seeds; -inf if one of them failed."""
    found = [each.get(figure, -math.inf) for each in results if each["settings"] == trial]
    return sum(found) / len(found)


def winner(trials: Sequence[Trial], results: Sequence[Mapping]) -> Trial:
    """The finalist with the largest mean objective. Those within `TIE` of it are equal: of these the one with
    the largest *alone* wins, because the objective says little about a rate that hardly learns a concept.
    """
    best = max(mean_of(trial, results) for trial in trials)
    equal = [trial for trial in trials if mean_of(trial, results) >= best - TIE]
    return max(equal, key=lambda trial: mean_of(trial, results, ALONE)) if len(equal) > 1 else equal[0]


TIE = 0.005      # of a mean objective; seeds of one trial differ by more
STAGES = 3      # before the one of the finalists
FINALISTS = 2
BUDGET = (len(RATE_FACTORS) + len(STRENGTH_FACTORS) + len(MORE_STEPS_FACTORS) + FINALISTS
          + len(style_rates.FACTORS))


def beyond(trial: Trial, results: Sequence[Mapping]) -> Trial | None:
    """The trial with twice the rates if the given one has the largest rate of all results, with half of them
    if it has the smallest; None if its rate is between others.
    """
    rates = {result["settings"]["lr"] for result in results}
    factor = 2.0 if trial["lr"] == max(rates) else 0.5 if trial["lr"] == min(rates) else None
    if factor is None:
        return None
    return _faster(trial, factor)


def run_of(method: str, trial: Trial, tasks: int, seed: int = SEED) -> Run:
    """The run of a trial; its overrides name all that the trial sets."""
    overrides = "+".join(f"{name}={value:g}".replace("e+", "e") for name, value in sorted(trial.items()))
    return Run(method, tasks, ORDER, seed, overrides=overrides)


def known_trials(methods: Mapping[str, Mapping], tasks: int) -> dict[str, dict]:
    """Name of a run -> its entry, without the stage, of the methods of an earlier result.

    Args:
        methods: As `Tuning.to_json` writes them.
        tasks: Of the tuning suite.
    """
    known = {}
    for method, entry in methods.items():
        for trial in entry["trials"]:
            is_of_styles = trial["stage"] > STAGES
            run = run_of(method, trial["settings"], STYLES if is_of_styles else tasks, trial["seed"])
            known[run.name] = {name: value for name, value in trial.items() if name != "stage"}
    return known

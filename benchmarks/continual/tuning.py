"""Chooses learning rates, strength and steps of every method on concepts that the benchmark does not use.

Every method gets the same number of trials or more, in four stages: rates, then the strength of its own main
regulariser, then steps. A stage starts from the best trial so far. A trial learns the tuning suite once. The
fourth stage repeats the best trials of the two best rates with a second seed, because one seed does not show
that a rate is too low for some runs. If the winner has the largest or smallest rate of all trials, rates
beyond it are tried with both seeds, until one is not better. At the end, further styles decide how much
faster styles are learned (`style_rates`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ...core.demo.scenes import SceneConcept
from ...core.methods import get
from ..report import write_result
from . import style_rates
from .concepts import STYLES, ordered, tuning_concepts, tuning_styles
from .embedded import STEPS, embedded_benchmark, usual_settings
from .judged import floor_and_ceiling
from .levels import file_of, measured
from .pictures import Sampler
from .prompt_suite import Benchmark, PromptSuite
from .runs import BASE, Run, settings_for
from .sequence_run import LearningError, finished_run, perform
from .sharing import is_finished, share
from .tables import ALONE, COMBINED, overall_share
from .trials import (
    BUDGET,
    ORDER,
    SECOND_SEED,
    SEED,
    STAGES,
    Trial,
    beyond,
    finalists,
    known_trials,
    mean_of,
    run_of,
    stage_trials,
    winner,
)
from .tuning_file import locked, stored_methods

PICTURES, GROUP_PICTURES, PAIR_PICTURES = 8, 6, 8
OBJECTIVE = ("mean of alone and combined at the end of the sequence, as shares of the way that all concepts "
             "together go from class nouns to real pictures, averaged over the judges; the mean of both "
             "seeds for the trials of the last stage")
def figures(run: Mapping, levels: Mapping) -> dict[str, float]:
    """The figures of a trial's run, and its objective, by all judges. A failed run has no objective, and
    neither has one whose pictures hold NaN, which cannot be compared with others.
    """
    if "failed" in run:
        return {}
    found = {}
    for figure in (ALONE, COMBINED):
        shares = [overall_share(run, levels, figure, judge) for judge in run["judges"]]
        found[figure] = sum(shares) / len(shares)
    if not all(map(math.isfinite, found.values())):
        return {}
    return {**found, "objective": (found[ALONE] + found[COMBINED]) / 2,
            "seconds_per_concept": run["seconds_per_concept"]}


class Tuning:
    """The trials of some methods, and the figures of those that are finished.

    Attributes:
        methods: Whose settings are chosen.
        folder: Folder of the trials.
        levels: Floor and ceiling of the tuning suite, which has so many `tasks`.
        style_levels: Those of the further styles.
        known: Name of a run -> its entry in an earlier result. Such a trial needs no file.
    """

    def __init__(self, methods: Sequence[str], folder: Path, levels: Mapping, tasks: int,
                 style_levels: Mapping, known: Mapping[str, Mapping] | None = None) -> None:
        self.methods, self.folder, self.levels, self.tasks = methods, folder, levels, tasks
        self.style_levels, self.known = style_levels, known or {}

    def _open(self, runs: Sequence[Run]) -> list[Run]:
        """The runs that are not known, whether they have a file or not."""
        return [run for run in runs if run.name not in self.known]

    def _result(self, method: str, trial: Trial, seed: int = SEED) -> dict | None:
        run = run_of(method, trial, self.tasks, seed)
        stored = finished_run(self.folder / f"{run.name}.json")
        if stored is None:
            return dict(self.known[run.name]) if run.name in self.known else None
        failed = {"failed": stored["failed"]} if "failed" in stored else {}
        return {"settings": trial, "seed": seed, **figures(stored, self.levels), **failed}

    def of(self, method: str) -> tuple[list[dict], list[Run], Trial | None]:
        """A method's finished trials, the runs of its present stage, and the chosen settings if all are
        finished. Without the trials of further styles.
        """
        done: list[dict] = []
        best: Trial = {}
        for stage in range(STAGES):
            trials = stage_trials(method, stage, best)
            results = [self._result(method, trial) for trial in trials]
            done += [{"stage": stage, **result} for result in results if result is not None]
            if None in results:
                return done, self._open([run_of(method, trial, self.tasks) for trial in trials]), None
            ranked = [result for result in done if "objective" in result]
            if not ranked:      # no rate works
                return done, [], trials[0]
            best = max(ranked, key=lambda result: result["objective"])["settings"]
        return self._final(method, done)

    def _final(self, method: str, done: list[dict]) -> tuple[list[dict], list[Run], Trial | None]:
        """The last stage, after the trials `done`; returns what `of` returns."""
        everything = list(done)

        def missing(trials: Sequence[Trial], seeds: Sequence[int]) -> list[Run]:
            """Adds the results of trials; returns all their runs if one is not finished."""
            found = [self._result(method, trial, seed) for trial in trials for seed in seeds]
            everything.extend({"stage": STAGES, **result} for result in found if result is not None)
            runs = [run_of(method, trial, self.tasks, seed) for trial in trials for seed in seeds]
            return self._open(runs) if None in found else []

        trials = finalists(done)
        runs = missing(trials, [SECOND_SEED])
        if runs:
            return everything, runs, None
        chosen = winner(trials, everything)
        while (further := beyond(chosen, everything)) is not None:
            runs = missing([further], [SEED, SECOND_SEED])
            if runs:
                return everything, runs, None
            if mean_of(further, everything) <= mean_of(chosen, everything):
                break
            chosen = further
        return everything, [], chosen

    def of_styles(self, method: str) -> tuple[list[dict], list[Run], Trial | None]:
        """The same for the trials of further styles, which begin when all others are finished."""
        chosen = self.of(method)[2]
        if chosen is None:
            return [], [], None
        trials = style_rates.trials_of(chosen)
        runs = [run_of(method, trial, STYLES) for trial in trials]
        found = style_rates.results(runs, trials, self.folder, self.style_levels, self.known)
        return [{"stage": STAGES + 1, **each} for each in found], self._open(runs), style_rates.best(found)

    def wanted(self) -> list[Run]:
        """The runs of the present stage of every method."""
        return [run for method in self.methods for run in self.of(method)[1]]

    def wanted_styles(self) -> list[Run]:
        return [run for method in self.methods for run in self.of_styles(method)[1]]

    def to_json(self, base: str) -> dict:
        methods = {}
        for method in self.methods:
            done = self.of(method)[0]
            styles, _, best = self.of_styles(method)
            methods[method] = {**({"chosen": best} if best is not None else {}), "trials": done + styles}
        return {"base": base, "tasks": self.tasks, "seeds": [SEED, SECOND_SEED], "order": ORDER,
                "objective": OBJECTIVE, "budget": BUDGET, "methods": methods}


def tuning_benchmark(base_name: str, sequence: Sequence[SceneConcept]) -> Benchmark:
    """The benchmark of a sequence for tuning on the embedded base, with fewer pictures than the benchmark."""
    benchmark = embedded_benchmark(sequence, STEPS, base_name)
    suite = benchmark.suite
    origin = {**suite.origin, "pictures": PICTURES, "group_pictures": GROUP_PICTURES}
    return replace(benchmark, suite=replace(
        suite, seeds=suite.seeds[:PICTURES], group_seeds=suite.group_seeds[:GROUP_PICTURES],
        pair_seeds=suite.pair_seeds[:PAIR_PICTURES], origin=origin), settings_of=usual_settings)


def _perform(sampler: Sampler, benchmark: Benchmark, run: Run, folder: Path) -> None:
    """Performs a trial. One that diverges is a result, too."""
    file = folder / f"{run.name}.json"
    if is_finished(folder, run) and "failed" in (finished_run(file) or {}):
        return
    settings, training = benchmark.configured(run)
    # wrong settings are an error, not a result
    get(run.method).config(**settings_for(settings, "object"))
    try:
        perform(sampler, benchmark.suite, run, ordered(run.tasks, run.order), settings, training, folder)
    except LearningError as error:
        write_result(file, {**run.to_json(), "failed": str(error)})


def tune(methods: Sequence[str], file: Path, folder: Path,
         tell: Callable[[str], object] = lambda _: None, base_name: str = BASE) -> dict:
    """Performs all missing trials, together with other processes of the same command.

    Args:
        methods: Whose settings are chosen.
        file: The result, written after every trial. Other methods that it holds stay. Trials that it holds
            are not repeated, so that a copy of this file is enough to continue elsewhere.
        folder: Folder of the trials.
        tell: Reports a finished trial.
        base_name: Name of the embedded base.

    Returns:
        The result: every trial with its figures, and the chosen settings of each method.

    Raises:
        ConceptError: The file is damaged, or it holds a result of another base or plan.
    """
    whole, styles = (tuning_benchmark(base_name, sequence)
                     for sequence in (tuning_concepts(), tuning_styles()))
    sampler, folder_of_styles = Sampler(whole.backbone), style_rates.folder_of(folder)
    tasks, base = len(whole.suite.tasks), whole.backbone.fingerprint
    # before levels are measured, which takes minutes
    known = known_trials(stored_methods(file, Tuning([], folder, {}, tasks, {}).to_json(base)), tasks)
    tuning = Tuning(methods, folder, _levels(sampler, whole.suite, folder), tasks,
                    _levels(sampler, styles.suite, folder_of_styles), known)

    def write() -> dict:
        with locked(file):
            result = tuning.to_json(base)
            result["methods"] = dict(sorted({**stored_methods(file, result), **result["methods"]}.items()))
            write_result(file, result)
        return result

    def trial(run: Run, benchmark: Benchmark, place: Path) -> None:
        was_finished = is_finished(place, run)
        _perform(sampler, benchmark, run, place)
        if not was_finished:
            tell(f"{run.name}: finished")
            write()

    share(folder, tuning.wanted, lambda run: trial(run, whole, folder))
    share(folder_of_styles, tuning.wanted_styles, lambda run: trial(run, styles, folder_of_styles))
    return write()


def _levels(sampler: Sampler, suite: PromptSuite, folder: Path) -> dict:
    return measured(file_of(folder, len(suite.tasks)), suite.origin,
                    lambda: floor_and_ceiling(sampler, suite))
